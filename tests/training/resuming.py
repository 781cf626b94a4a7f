"""Program of the tests' server: train, stop by real signals, resume, and record what the runs left behind.

It runs on one rank or more with the words FOLDER CASE ...: whole trainings one after another in one process, because a
process for each would take most of the time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cogflow.config.compose import compose
from cogflow.errors import Stopped
from cogflow.runtime import ranks
from cogflow.stages import load
from cogflow.training import batch as batches

STEPS = 6
"""Steps of a run. Each takes 4 of 10 clips: the first epoch ends within step 3, the second with step 5.

Held-out losses follow steps 2, 4 and 6, and a save follows step 4.
"""


def words(root: Path, name: str, *more: str) -> list[str]:
    """Return words of a short training with two micro steps, an EMA, held-out losses and several checkpoints."""
    batch = 2 // ranks.world_size()
    return [
        "stage=train",
        "debug=quick",
        f"run.root={root}",
        f"run.name={name}",
        f"stage.steps={STEPS}",
        f"stage.batch_size={batch}",
        "stage.gradient_accumulation=2",
        "stage.ema_decay=0.9",
        "stage.evaluate_every=2",
        "stage.sample_every=0",
        "stage.save_every=4",
        "stage.keep_last=9",
        "tracking.wandb=disabled",
        f"model.path={root / 'model'}",
        *more,
    ]


def train(root: Path, name: str, *more: str) -> int:
    """Train until the end or a signal; return the exit code that the command would have."""
    folder = root / name
    if ranks.is_main() and not folder.exists():
        folder.mkdir(parents=True)
        shutil.copytree(root / "prepared" / "cache", folder / "cache")
    ranks.setup()
    ranks.barrier()
    try:
        load("train").run(compose(words(root, name, *more)))
        return 0
    except Stopped as stopped:
        return stopped.exit_code


@contextmanager
def signalled(at: tuple[int, int], number: int = signal.SIGUSR1, rank: int = 0) -> Iterator[list[tuple[int, int]]]:
    """Make ``rank`` send itself a real signal when it begins ``at``, a (step, micro step); yield where it was sent."""
    take, fired = batches.Loader.take, []

    def taking(self: Any, step: int, micro: int) -> Any:
        if (step, micro) == at and ranks.rank() == rank % ranks.world_size():
            fired.append((step, micro))
            os.kill(os.getpid(), number)
        return take(self, step, micro)

    batches.Loader.take = taking  # type: ignore[method-assign]
    try:
        yield fired
    finally:
        batches.Loader.take = take  # type: ignore[method-assign]


def left(folder: Path) -> dict[str, Any]:
    """Return every training metric of a run by step, and hashes of weights, EMA and optimizer states."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers: dict[str, dict[str, float]] = {}
    for line in lines:
        kept = {
            name: value
            for name, value in line.items()
            if name.startswith(("train/", "heldout/", "ema/", "spectrum/"))
            and name not in ("train/step_time", "train/samples_per_second", "train/memory_gb", "train/data_wait")
        }
        numbers.setdefault(str(line["step"]), {}).update(kept)
    last = folder / "checkpoints" / f"step-{STEPS:06d}"
    files = {
        path.relative_to(last).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(last.rglob("*"))
        if path.suffix == ".safetensors"
    }
    return {"numbers": numbers, "files": files, "optimizer": _states(last)}


def _states(last: Path) -> str:
    """Return a hash over masters and moments of all parameters, which does not depend on the number of ranks."""
    from cogflow.training.reshard import SavedAdamStates
    from cogflow.weights.zero import MOMENTS

    names = parameter_names(last)
    states = SavedAdamStates(last / "deepspeed" / "state", names)
    digest = hashlib.sha256(str(states.steps).encode())
    for name in names:
        for key in ("fp32", *MOMENTS):
            digest.update(states.read(name, key).contiguous().numpy().tobytes())
    return digest.hexdigest()


def parameter_names(last: Path) -> list[str]:
    """Return the names of the model's parameters in the model's order."""
    from diffusers import CogVideoXTransformer3DModel

    config = CogVideoXTransformer3DModel.load_config(last / "transformer")
    return [name for name, _ in CogVideoXTransformer3DModel.from_config(config).named_parameters()]


def stopped(root: Path, zero: str, ends: str) -> dict[str, Any]:
    """Return the results of an uninterrupted run and of a stopped and resumed one.

    A signal to the last rank stops it within each of the steps ``ends``, between two micro steps.
    """
    whole, name = f"{zero}-{ranks.world_size()}-whole", f"{zero}-{ranks.world_size()}-stopped"
    train(root, whole, f"deepspeed={zero}")
    codes, fired = [], 0
    for end in map(int, ends.split("+")):
        with signalled((end, 1), rank=-1) as seen:
            codes.append(train(root, name, f"deepspeed={zero}"))
            fired += len(ranks.gather(seen)[-1])
    codes.append(train(root, name, f"deepspeed={zero}"))
    return {"codes": codes, "fired": fired, "whole": _left(root / whole), "stopped": _left(root / name)}


def resharded(root: Path, first: str, then: str) -> dict[str, Any]:
    """Return the results of a run that changes its ZeRO stage after three steps, and of one that does not."""
    whole, name = f"{first}-{ranks.world_size()}-whole", f"{first}-{then}-{ranks.world_size()}"
    train(root, whole, f"deepspeed={first}")
    first_half(root, first, name)
    train(root, name, f"deepspeed={then}")
    return {"whole": _left(root / whole), "changed": _left(root / name)}


def whole(root: Path, zero: str) -> dict[str, Any]:
    """Return the results of an uninterrupted run; when another case has trained it, nothing is trained."""
    name = f"{zero}-{ranks.world_size()}-whole"
    train(root, name, f"deepspeed={zero}")
    return {"whole": _left(root / name)}


def first_half(root: Path, zero: str, name: str) -> dict[str, Any]:
    """Train three steps of a run, which another number of ranks resumes."""
    with signalled((2, 1)):
        return {"code": train(root, name, f"deepspeed={zero}")}


def resume(root: Path, zero: str, name: str) -> dict[str, Any]:
    """Resume a run that another number of ranks began, and return its results."""
    train(root, name, f"deepspeed={zero}")
    return {"changed": _left(root / name)}


def _left(folder: Path) -> dict[str, Any]:
    ranks.barrier()
    return left(folder) if ranks.is_main() else {}


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "stopped": stopped,
    "whole": whole,
    "resharded": resharded,
    "first_half": first_half,
    "resume": resume,
}


def main(arguments: Sequence[str]) -> None:
    """Run cases such as ``stopped:zero2:1+2`` in FOLDER, which contains ``prepared/cache`` and ``model``."""
    root = Path(arguments[0])
    for case in arguments[1:]:
        kind, *rest = case.split(":")
        found = CASES[kind](root, *rest)
        if ranks.is_main():
            (root / f"{case.replace(':', '-')}-{ranks.world_size()}.json").write_text(json.dumps(found))
    ranks.close()
