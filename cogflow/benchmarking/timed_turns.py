"""Time a running training in turns of several steps.

Another loop may run between the turns, for a paired comparison.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from cogflow.runtime import ranks
from cogflow.training.step_monitor import Hooks


@dataclass(frozen=True)
class Turn:
    """Mean seconds of a step in one turn. ``wall``: by the clock. ``cores``: CPU time of all threads of the process."""

    wall: float
    cores: float


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step over all turns; ``clips``: clips per second on this rank."""

    median: float
    lowest: float
    highest: float
    clips: float


class TimedTurns:
    """Time every ``steps`` steps as one turn in ``ours``; wait for the device only at the end of a turn.

    ``other``: a loop whose next ``steps`` values are taken after each turn, with their time in ``theirs``. ``advance``
    is called with 1 after every turn.
    """

    def __init__(
        self, steps: int, device: torch.device, advance: Callable[[int], None], other: Iterator[None] | None = None
    ) -> None:
        self.steps, self.device, self.advance, self.other = steps, device, advance, other
        self.ours: list[Turn] = []
        self.theirs: list[Turn] = []
        self._done = 0
        self._clock = self._now()

    def after_step(self, note: str) -> None:
        """Count one step; the training calls this after each."""
        self._done += 1
        if self._done % self.steps:
            return
        self.ours.append(self._end_turn())
        if self.other is not None:
            for _ in itertools.islice(self.other, self.steps):
                pass
            self.theirs.append(self._end_turn())
        self.advance(1)

    def hooks(self, log: Callable[[int, dict[str, float]], None]) -> Hooks:
        """Return hooks of a training that does nothing between steps but ``log`` and :meth:`after_step`."""
        return idle_hooks(log, self.after_step)

    def _end_turn(self) -> Turn:
        wall, cores = self._clock
        self._clock = self._now()
        return Turn((self._clock[0] - wall) / self.steps, (self._clock[1] - cores) / self.steps)

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()


def idle_hooks(log: Callable[[int, dict[str, float]], None], after_step: Callable[[str], None]) -> Hooks:
    """Return hooks that neither validate nor save nor stop."""

    def nothing(*_: Any) -> None:
        pass

    return Hooks(
        log=log,
        validate=nothing,
        save=nothing,
        stopped=nothing,
        save_weights=nothing,
        stop=lambda: ranks.any_rank(False),
        advance=after_step,
        warn=nothing,
        not_finite=nothing,
    )


def step_times(turns: list[Turn], batch_size: int) -> StepTimes | None:
    """Return the times over ``turns``; ``None`` without turns."""
    if not turns:
        return None
    walls = sorted(turn.wall for turn in turns)
    return StepTimes(median(walls), walls[0], walls[-1], batch_size / median(walls))
