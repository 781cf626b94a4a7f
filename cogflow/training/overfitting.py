"""Whether training has begun to learn the clips by heart: the held-out loss rises again, while the pictures stay sharp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RISEN = 0.15
"""Share by which the held-out loss must lie above its lowest. Noise and timesteps are the same every time: in 120 healthy steps of the tiny
model it rises by at most 0.02; trained on four clips it is up by 0.2 after 60 steps, and doubled after 360."""
IN_A_ROW = 2  # evaluations


class Overfitting:
    """Follows the held-out loss. Its state is a plain JSON object that a checkpoint carries."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        given = dict(state or {})
        self.lowest: list[float] | None = given.get("lowest")  # step, loss
        self.above = int(given.get("above", 0))
        self.told: int | None = given.get("told")

    def state(self) -> dict[str, Any]:
        return {"lowest": self.lowest, "above": self.above, "told": self.told}

    def update(self, step: int, heldout: float) -> str | None:
        """Take in the held-out loss after ``step`` steps; a sentence the first time that it has risen for good."""
        if self.lowest is None or heldout < self.lowest[1]:
            self.lowest, self.above = [step, heldout], 0
            return None
        self.above = self.above + 1 if heldout > (1 + RISEN) * self.lowest[1] else 0
        if self.above < IN_A_ROW or self.told is not None:
            return None
        self.told = step
        return (
            f"step {step}: the held-out loss is {heldout:.4g}, after {self.lowest[1]:.4g} at step {self.lowest[0]:.0f}: the model learns "
            "its clips by heart, or the learning rate is too high. Train shorter, on more clips, or with a lower stage.learning_rate."
        )
