"""Time a running training in turns of several steps.

Another loop may run between the turns, for a paired comparison.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import SupportsFloat

import torch

from cogflow.tracking.tracker import Tracker
from cogflow.training.callback import Callback, StepUpdate, TrainingContext


@dataclass(frozen=True)
class Turn:
    """Mean seconds of a step in one turn. ``wall``: elapsed time. ``cores``: CPU time of all threads of the process."""

    wall: float
    cores: float


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step over all turns; ``clips``: clips per second on this rank."""

    median: float
    lowest: float
    highest: float
    clips: float


class TimedTurns(Callback):
    """Append the time of every ``steps`` steps to ``ours`` as one turn. It waits for the device only at the end of a
    turn.

    ``other``: a loop that runs for ``steps`` steps after each turn; its times are in ``theirs``. ``advance`` is called
    with 1 after every turn.
    """

    def __init__(
        self, steps: int, device: torch.device, advance: Callable[[int], None], other: Iterator[None] | None = None
    ) -> None:
        self.steps, self.device, self.advance, self.other = steps, device, advance, other
        self.ours: list[Turn] = []
        self.theirs: list[Turn] = []
        self._done = 0
        self._clock = self._now()

    def on_step_end(self, context: TrainingContext, update: StepUpdate) -> None:
        """Count one step."""
        self._done += 1
        if self._done % self.steps:
            return
        self.ours.append(self._end_turn())
        if self.other is not None:
            for _ in itertools.islice(self.other, self.steps):
                pass
            self.theirs.append(self._end_turn())
        self.advance(1)

    def _end_turn(self) -> Turn:
        wall, cores = self._clock
        self._clock = self._now()
        return Turn((self._clock[0] - wall) / self.steps, (self._clock[1] - cores) / self.steps)

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()


class DataWaits(Tracker):
    """A tracker that collects the seconds that steps waited for data, and forwards metrics to ``inner``."""

    def __init__(self, inner: Tracker | None = None) -> None:
        self.seconds: list[float] = []
        self._inner = inner or Tracker()

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        self.seconds.append(float(values["train/data_wait"]))
        self._inner.log(step, values)


def step_times(turns: list[Turn], batch_size: int) -> StepTimes | None:
    """Return the times of ``turns``; ``None`` without turns."""
    if not turns:
        return None
    walls = sorted(turn.wall for turn in turns)
    return StepTimes(median(walls), walls[0], walls[-1], batch_size / median(walls))
