"""A training that runs on, timed in turns; something else may have its turn in between."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cogflow.runtime import ranks
from cogflow.training.step_monitor import Hooks


@dataclass(frozen=True)
class Turn:
    """Seconds of a step: by the clock, and of all cores."""

    wall: float
    cores: float


class Turns:
    """Keeps the time of every ``steps`` steps in ``ours``, waiting for the device at their end alone; then ``other`` takes as many of its
    own, which are kept in ``theirs``. ``advance``: called after every turn."""

    def __init__(
        self, steps: int, device: torch.device, advance: Callable[[int], None], other: Iterator[None] | None = None
    ) -> None:
        self.steps, self.device, self.advance, self.other = steps, device, advance, other
        self.ours: list[Turn] = []
        self.theirs: list[Turn] = []
        self._done = 0
        self._clock = self._now()

    def after_step(self, note: str) -> None:
        """To be called after every step."""
        self._done += 1
        if self._done % self.steps:
            return
        self.ours.append(self._turn())
        if self.other is not None:
            for _ in itertools.islice(self.other, self.steps):
                pass
            self.theirs.append(self._turn())
        self.advance(1)

    def hooks(self, log: Callable[[int, dict[str, float]], None]) -> Hooks:
        """Of a training between whose steps nothing is due but ``log``."""

        def nothing(*_: Any) -> None:
            pass

        return Hooks(
            log=log, validate=nothing, save=nothing, stopped=nothing, save_weights=nothing, stop=lambda: ranks.any_rank(False),
            advance=self.after_step, warn=nothing, not_finite=nothing,
        )  # fmt: skip

    def _turn(self) -> Turn:
        wall, cores = self._clock
        self._clock = self._now()
        return Turn((self._clock[0] - wall) / self.steps, (self._clock[1] - cores) / self.steps)

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()
