"""Whether the averaged weights keep up: their held-out loss beside the model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FALLEN = (
    0.05  # share of its first value by which the model's held-out loss must have fallen before the averages are judged
)
BEHIND = 0.25  # of the model's fall: averages that have less of it are behind
IN_A_ROW = 2  # evaluations


class Averages:
    """Follows both held-out losses. Its state is a plain JSON object that a checkpoint carries."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        given = dict(state or {})
        self.first: float | None = given.get("first")
        self.behind = int(given.get("behind", 0))
        self.told: int | None = given.get("told")

    def state(self) -> dict[str, Any]:
        return {"first": self.first, "behind": self.behind, "told": self.told}

    def update(self, step: int, model: float, averages: float) -> str | None:
        """Take in the losses after ``step``; a sentence the first time the averages are behind. ``first`` is what was seen first."""
        if self.first is None:
            self.first = model
            return None
        fallen = self.first - model
        slow = fallen > FALLEN * self.first and self.first - averages < BEHIND * fallen
        self.behind = self.behind + 1 if slow else 0
        if self.behind < IN_A_ROW or self.told is not None:
            return None
        self.told = step
        return (
            f"step {step}: the model's held-out loss fell from {self.first:.4g} to {model:.4g}, its averages' only to {averages:.4g}: "
            "samples and exports show the averages. Lower stage.ema_decay, use stage.ema_warmup=true, or export with stage.weights=model."
        )
