"""The learning rate as a pure function of the step: nothing to save, nothing to resume wrongly."""

from __future__ import annotations

import math

from cogflow.config.schema import TrainStage


def learning_rate(step: int, stage: TrainStage) -> float:
    """The rate of step ``step`` (from 0): a linear warm-up, then ``stage.schedule`` down to ``min_lr_ratio`` at the last step."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return stage.learning_rate
    done = (step - stage.warmup_steps) / max(1, stage.steps - 1 - stage.warmup_steps)
    left = 1.0 - min(1.0, done)
    shape = left if stage.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
    return stage.learning_rate * (stage.min_lr_ratio + (1.0 - stage.min_lr_ratio) * shape)
