"""What a step may not do unseen: a loss or gradient that is not finite, a spike, an fp16 scale that falls and falls.

The rules alone; :mod:`cogflow.training.loop` asks them and :mod:`cogflow.training.policy` acts. All state is plain JSON, for a
checkpoint's ``trainer.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WINDOW = 128  # steps that a spike is held against
EARLIEST = 32  # steps before anything is called one
SIGMAS = 6.0
MOST_SKIPPED = 20  # steps left out one after another before training stops: it is not training any more
FLOOR = 0.02  # of the mean: the least deviation, so that a loss that hardly moves does not spike by a hair


class Spikes:
    """Values over SIGMAS deviations above the mean of the last WINDOW steps, in their logarithm: losses and norms spread by factors.

    A spike is not learned from, unless so many follow each other that it is the new state of things.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        given = dict(state or {})
        self._values: list[float] = list(given.get("values", []))
        self._above = int(given.get("above", 0))

    def state(self) -> dict[str, Any]:
        return {"values": self._values, "above": self._above}

    def sigmas(self, value: float) -> float:
        """By how many deviations ``value`` lies above the window's mean; 0 while there is too little to tell."""
        if len(self._values) < EARLIEST or not math.isfinite(value) or value <= 0:
            return 0.0
        # statistics.pstdev adds up fractions, exactly and slowly: a tenth of a millisecond at every step.
        mean = math.fsum(self._values) / len(self._values)
        deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in self._values) / len(self._values))
        return (math.log(value) - mean) / max(deviation, FLOOR)

    def is_spike(self, value: float) -> bool:
        return self.sigmas(value) > SIGMAS

    def update(self, value: float) -> float | None:
        """Take in a step's value; its deviations when it is a spike."""
        sigmas = self.sigmas(value)
        spike = sigmas > SIGMAS
        self._above = self._above + 1 if spike else 0
        if math.isfinite(value) and value > 0 and (not spike or self._above > WINDOW // 4):
            self._values = [*self._values, math.log(value)][-WINDOW:]
        return sigmas if spike else None


class Skipped:
    """Steps that were left out: all, and those in a row."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        given = dict(state or {})
        self.total, self.in_a_row = int(given.get("total", 0)), int(given.get("in_a_row", 0))

    def state(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def update(self, applied: bool) -> None:
        self.total += not applied
        self.in_a_row = 0 if applied else self.in_a_row + 1

    @property
    def too_many(self) -> bool:
        return self.in_a_row >= MOST_SKIPPED


def not_finite_line(step: int, by_rank: Sequence[Sequence[str]]) -> str:
    """What to say of step ``step`` (from 1). ``by_rank``: on each rank the clips whose own loss was not finite."""
    found = [f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(by_rank) if names]
    if not found:
        return f"The gradient of step {step} is not finite, though every loss is; the weights are still those before it"
    return f"The loss of step {step} is not finite ({'; '.join(found)}); the weights are still those before it"
