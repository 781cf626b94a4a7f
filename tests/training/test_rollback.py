"""Test the learning rate after rollbacks, and when a run may roll back."""

from __future__ import annotations

import pytest

from cogflow.config.train_settings import RollbackConfig
from cogflow.records.history_records import RollbackEntry
from cogflow.training import rollback


def test_the_rate_factor_is_a_function_of_the_step() -> None:
    two = [RollbackEntry(30, 10, 0.5, ""), RollbackEntry(40, 20, 0.1, "")]
    factors = [rollback.rate_factor(two, step) for step in (0, 9, 10, 19, 20, 99)]
    assert factors == pytest.approx([1, 1, 0.5, 0.5, 0.05, 0.05])
    assert rollback.rate_factor([], 5) == 1.0


def test_a_rollback_needs_other_settings_and_is_limited() -> None:
    assert "same settings" in str(rollback.refusal(RollbackConfig(), []))
    settings = RollbackConfig(learning_rate_ratio=0.3, most=1)
    assert rollback.refusal(settings, []) is None
    assert "most=1" in str(rollback.refusal(settings, [RollbackEntry(30, 10, 0.3, "")]))
