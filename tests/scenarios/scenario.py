"""The scenarios: their faults, and the rungs that must find them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cogflow.models import tiny
from tests.scenarios import sabotage


@dataclass(frozen=True)
class Size:
    """Length of a scenario's training, and interval of its validations."""

    clips: int = 64
    steps: int = 120
    batch_size: int = 8
    sample_every: int = 20
    prompts: int = 8
    sampling_steps: int = 10


@dataclass(frozen=True)
class Scenario:
    """One training with or without a fault.

    ``rung``: the rung at which the fault enters and must be found. ``quiet``: no alarm is allowed. Without either, the
    findings are only reported. ``words``: settings of stage=train. ``longer``: factor of the number of steps.
    ``rescaled``: the cached latents have a wrong factor.
    """

    letter: str
    title: str
    rung: int | None = None
    quiet: bool = False
    style: sabotage.Style = sabotage.plain
    clips: int | None = None
    holdout: int = 8
    words: tuple[str, ...] = ()
    longer: int = 1
    model: Callable[[Path, Path], Path] | None = None
    rescaled: bool = False

    @property
    def data(self) -> str:
        """Name of the folder of clips; scenarios with equal clips share it."""
        return f"{self.style.__name__}-{self.clips or 'all'}"


SCENARIOS = {
    scenario.letter: scenario
    for scenario in (
        Scenario("a", "a healthy finetune", quiet=True),
        Scenario("b", "half the clips are secretly blurred", rung=0, style=sabotage.half_blurred),
        Scenario("c", "all clips were scaled up from a quarter of the size", rung=0, style=sabotage.quarter_size),
        Scenario("d", "the learning rate is 30 times too high", rung=4, words=("stage.learning_rate=1.2e-2",)),
        Scenario("e", "latents prepared with 2B's scaling factor, trained as 5B's", rung=2, rescaled=True),
        Scenario("f", "the schedule has 2B's SNR shift", rung=3, model=sabotage.with_2b_schedule),
        Scenario(
            "g",
            "the VAE runs in fp16 and overflows",
            rung=2,
            model=sabotage.with_overflowing_vae,
            words=("sampling.vae_dtype=fp16",),
        ),
        Scenario(
            "h", "an EMA so slow that it stays behind", words=("stage.ema_decay=0.9999", "stage.ema_warmup=false")
        ),
        Scenario("i", "trained far too long on four clips", clips=8, holdout=4, longer=3),
        Scenario("j", "nine of ten captions dropped", words=("stage.text_dropout=0.9",)),
        Scenario("k", "a healthy finetune on softer, legitimate clips", quiet=True, style=sabotage.soft_style),
        Scenario("l", "the learning rate is 10 times too high", words=("stage.learning_rate=4e-3",)),
    )
}


def prepare_clips(root: Path, scenario: Scenario, size: Size) -> Path:
    """Draw the clips of ``scenario`` below ``root`` unless they exist, and return their folder."""
    folder = root / "clips" / scenario.data
    if not (folder / "metadata.jsonl").is_file():
        sabotage.draw_clips(folder, scenario.clips or size.clips, scenario.style)
    return folder


def run(
    root: Path, scenario: Scenario, size: Size, seed: int = 0, *extra: str, command: Callable[..., object] | None = None
) -> Path:
    """Prepare and train ``scenario`` below ``root`` with the command line, and return the run's folder.

    A finished run is not repeated. ``command``: runs cogflow with the words; by default :func:`started`.
    """
    command = command or started
    clips = prepare_clips(root, scenario, size)
    name = scenario.letter if not seed else f"{scenario.letter}-seed{seed}"
    folder = root / "runs" / name
    if (folder / "train.json").is_file():
        return folder
    model = tiny.folder()
    if scenario.model is not None:
        model = root / "models" / scenario.model.__name__
        if not model.is_dir():
            scenario.model(tiny.folder(), model)
    prompts = sabotage.prompts(root / "prompts.jsonl", size.prompts)
    steps = size.steps * scenario.longer
    common = [
        "data=folder",
        f"data.path={clips}",
        f"data.holdout={scenario.holdout}",
        f"model.path={model}",
        f"run.root={root / 'runs'}",
        f"run.name={name}",
        "tracking.wandb=disabled",
    ]
    command("stage=prepare", *common)
    if scenario.rescaled:
        sabotage.rescale_cache(folder / "cache")
    command(
        "stage=train",
        *common,
        f"stage.steps={steps}",
        f"stage.batch_size={size.batch_size}",
        "stage.save_every=0",
        "stage.keep_last=1",
        f"stage.sample_every={size.sample_every}",
        f"stage.evaluate_every={size.sample_every}",
        "stage.schedule=constant",
        f"stage.seed={seed}",
        f"sampling.prompts={prompts}",
        f"sampling.steps={size.sampling_steps}",
        *scenario.words,
        *extra,
    )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder


def started(*words: str, codes: tuple[int, ...] = (0,)) -> str:
    """Run ``python -m cogflow`` with ``words`` and return its output; its exit code must be one of ``codes``."""
    done = subprocess.run(
        [sys.executable, "-m", "cogflow", *words],
        capture_output=True,
        text=True,
        timeout=1800,
        env=dict(os.environ),
        check=False,
    )
    if done.returncode not in codes:
        raise AssertionError(
            f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
    return done.stdout


if __name__ == "__main__":
    # python -m tests.scenarios.scenario FOLDER [letters]
    for letter in sys.argv[2] if len(sys.argv) > 2 else "".join(SCENARIOS):
        print(letter, run(Path(sys.argv[1]), SCENARIOS[letter], Size()), flush=True)
