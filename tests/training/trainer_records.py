"""Trainer records for tests."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from cogflow.config.train_settings import TrainStage
from cogflow.records.training_records import (
    ModelIdentity,
    RankLayout,
    TrainedWith,
    TrainerRecord,
    TunableSettings,
    ValidationRecord,
)


def trainer_record(step: int, **values: Any) -> TrainerRecord:
    """Return the record of a checkpoint of the tiny model with default settings; ``values`` replace fields."""
    stage = TrainStage()
    given: dict[str, Any] = {
        "step": step,
        "family": "tiny",
        "model": ModelIdentity("tiny"),
        "trained_with": TrainedWith(),
        "identity": {},
        "layout": RankLayout(8, 1, 1, 2, False),
        "settings": TunableSettings(**{field.name: getattr(stage, field.name) for field in fields(TunableSettings)}),
    }
    return TrainerRecord(**{**given, **values})


def verdict(step: int, score: float, heldout_loss: float | None = None) -> ValidationRecord:
    """Return a verdict without findings."""
    return ValidationRecord(step, "learning", score, [], "", heldout_loss)
