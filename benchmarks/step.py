"""Compare cogflow's training step with CogVideo's own, or with another revision of cogflow: ``python -m benchmarks.step
--vs CLONE|REVISION``.

Every step runs in its own process, with a model of the same shape, clips of the same size, and random weights and
clips.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.output import RESULTS, new_parser, report
from benchmarks.overhead import benchmark_config
from benchmarks.peers import cogvideo_step
from cogflow.benchmarking.device_peak import measure_device_peak
from cogflow.benchmarking.step import StepCost
from cogflow.benchmarking.step_settings import AS_CONFIGURED, SettingResult, run_setting, settings_result
from cogflow.benchmarking.timed_turns import Turn, step_times
from cogflow.config.benchmark_settings import BenchmarkStage
from cogflow.config.config import Config
from cogflow.errors import ConfigError, DataError
from cogflow.models import loading
from cogflow.runtime import ranks
from cogflow.training import flops, transformer_size

COGVIDEO_TRAINER = Path("finetune") / "models" / "cogvideox_t2v" / "sft_trainer.py"
REPOSITORY = Path(__file__).resolve().parents[1]


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command line ``words`` (default: ``sys.argv``)."""
    parser = new_parser("step", __doc__)
    parser.add_argument("--vs", required=True, help="a clone of zai-org/CogVideo, or a git revision of this repository")
    parser.add_argument("--vs-python", default=sys.executable, help="the interpreter of the clone's own environment")
    parser.add_argument("--folder", type=Path, default=RESULTS / "step", help="folder of the runs (%(default)s)")
    parser.add_argument("settings", nargs="*", help="settings of cogflow, such as model=cogvideox-5b stage.repeats=3")
    given = parser.parse_args(words)
    config = benchmark_config(given.settings)
    settings = [f"model={config.model.name}", *(s for s in given.settings if not s.startswith("model="))]
    given.folder.mkdir(parents=True, exist_ok=True)
    results = []
    if is_cogvideo(Path(given.vs).expanduser()):
        results.append(run_setting(settings, "", given.folder / "cogflow", name=AS_CONFIGURED))
        clone = Path(given.vs).expanduser()
        results.append(cogvideo_result(config, clone, given.vs_python, given.folder / "peer"))
    else:
        with checked_out(given.vs, given.folder) as tree:
            results.append(run_setting(settings, "", given.folder / "cogflow", name=AS_CONFIGURED))
            results.append(
                run_setting(settings, "", given.folder / "revision", name=f"cogflow at {given.vs}", cwd=tree)
            )
    report(settings_result(results, given.folder), given.output)


def is_cogvideo(folder: Path) -> bool:
    """Return whether ``folder`` is a clone of zai-org/CogVideo with its ``finetune/``."""
    return (folder / COGVIDEO_TRAINER).is_file()


def cogvideo_result(config: Config[BenchmarkStage], clone: Path, python: str, folder: Path) -> SettingResult:
    """Return the cost of CogVideo's own step. An error becomes the result's problem."""
    name = "CogVideo's own step"
    try:
        return SettingResult(name, measure_cogvideo_step(config, clone, python, folder))
    except DataError as error:
        return SettingResult(name, None, str(error))


def measure_cogvideo_step(config: Config[BenchmarkStage], clone: Path, python: str, folder: Path) -> StepCost:
    """Measure the step of the clone's ``finetune/`` with the interpreter ``python``.

    Raises :class:`DataError` with the last line of output when the step fails.
    """
    stage, data = config.stage, config.data
    device = ranks.device()
    dtype = loading.resolve_dtype(config.model, device)
    peak = measure_device_peak(device, dtype)
    described = transformer_size.description_of(config.model).config
    size = transformer_size.of_config(described)
    folder.mkdir(parents=True, exist_ok=True)
    request, answer = folder / "request.json", folder / "answer.json"
    asked = {
        "clone": str(clone.resolve()),
        "config": described,
        "dtype": str(dtype).removeprefix("torch."),
        "gpu": device.type == "cuda",
        "latents": [(data.frames - 1) // size.frames_per_latent + 1, data.height // 8, data.width // 8],
        "port": _free_port(),
        "batch_size": stage.batch_size,
        "steps": stage.steps,
        "repeats": stage.repeats,
        "recompute": config.deepspeed.activation_checkpointing,
    }
    request.write_text(json.dumps(asked), encoding="utf-8")
    answer.unlink(missing_ok=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    command = [python, str(Path(cogvideo_step.__file__)), str(request), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not answer.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise DataError(
            f"CogVideo's step in {clone} ended with {done.returncode}: {lines[-1] if lines else 'no output'}",
            "Give the Python of the clone's own environment with --vs-python.",
        )
    found = json.loads(answer.read_text(encoding="utf-8"))
    times = step_times([Turn(seconds, 0.0) for seconds in found["turns"]], stage.batch_size)
    tokens = transformer_size.tokens(size, data.frames, data.height, data.width)
    useful = flops.step(size, tokens).total * stage.batch_size
    return StepCost(
        model=config.model.name,
        parameters=size.parameters,
        size=f"{data.frames}x{data.height}x{data.width}",
        tokens=tokens.total,
        dtype=loading.dtype_name(dtype),
        device_peak=peak,
        times=times,
        mfu=useful / times.median / peak.flops if times else None,
        memory={"peak": found["peak"] / 1e9},
    )


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@contextmanager
def checked_out(revision: str, folder: Path) -> Iterator[Path]:
    """Check a git revision of this repository out below ``folder``.

    Raises :class:`ConfigError` for an unknown revision.
    """
    with TemporaryDirectory(dir=folder) as place:
        tree = Path(place).resolve() / "tree"
        git = ["git", "-C", str(REPOSITORY), "worktree"]
        add = [*git, "add", "--detach", str(tree), revision]
        done = subprocess.run(add, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(
                f"--vs {revision} is neither a clone of zai-org/CogVideo nor a revision of {REPOSITORY}.",
                done.stderr.strip()[-200:],
            )
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], capture_output=True, check=False)


if __name__ == "__main__":
    main()
