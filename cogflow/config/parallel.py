"""What is wrong with ranks that share their batches, as far as settings and sizes tell."""

from __future__ import annotations

import os
from collections.abc import Iterator

from cogflow.config.problems import Problem
from cogflow.config.schema import AnyConfig, TrainStage

KEY = "parallel.sequence"


def sequence_problems(config: AnyConfig, gpus: int, heads: int | None = None) -> Iterator[Problem]:
    """What is wrong with ``parallel.sequence`` on ``gpus`` ranks (0: not known) for a model of so many attention heads."""
    size = config.parallel.sequence
    for count, what in (
        (gpus, f"rank{'s' if gpus != 1 else ''} in all"),
        (heads or 0, f"attention heads of model={config.model.name}"),
    ):
        if count % max(1, size):
            good = ", ".join(str(one) for one in range(1, count + 1) if count % one == 0)
            yield Problem(f"{KEY}={size}: it should divide the {count} {what}: one of {good}.", (KEY,))


def shared(config: AnyConfig, train: TrainStage) -> Iterator[Problem]:
    """What the settings of a training alone tell.

    Launchers ask for the settings outside of the ranks: how many there will be is then not known, and judged by the stage.
    """
    processes = os.environ.get("WORLD_SIZE", "")
    gpus = train.plan_gpus if train.plan and train.plan_gpus else int(processes) if processes.isdecimal() else 0
    yield from sequence_problems(config, gpus)
    if config.parallel.sequence > 1 and config.speed.compile in ("blocks", "graphs"):
        yield Problem(
            f"speed.compile={config.speed.compile}: with {KEY}={config.parallel.sequence} blocks are not compiled; it should be off or "
            "auto.",
            ("speed.compile", KEY),
        )


def not_measured(config: AnyConfig) -> Problem:
    """Of benchmarks, whose ranks take a batch each."""
    return Problem(
        f"{KEY}={config.parallel.sequence}: stage=benchmark measures ranks that share nothing; it should be 1.", (KEY,)
    )
