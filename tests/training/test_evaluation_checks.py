"""Test the checks of the held-out losses: overfitting, and an EMA that does not keep up. Each is reported once."""

from __future__ import annotations

import pytest

from cogflow.training.evaluation import EmaCheck, OverfittingCheck

OVERFITTING = [0.214, 0.199, 0.220, 0.239, 0.254, 0.275]
"""Held-out losses of a training on four clips, every 20 steps."""

SLOW_EMA = [(0.30, 0.30), (0.25, 0.299), (0.22, 0.298), (0.20, 0.297), (0.19, 0.296)]
"""Held-out losses of the model and of its EMA, every 10 steps."""


def overfitting_messages(losses: list[float], resumed_at: int = 0) -> list[str | None]:
    check, messages = OverfittingCheck(), []
    for index, loss in enumerate(losses):
        if resumed_at and index == resumed_at:
            check = OverfittingCheck(check.state_dict())
        messages.append(check.update(20 * index, loss))
    return messages


def ema_messages(losses: list[tuple[float, float]], resumed_at: int = 0) -> list[str | None]:
    check, messages = EmaCheck(), []
    for index, (model, ema) in enumerate(losses):
        if resumed_at and index == resumed_at:
            check = EmaCheck(check.state_dict())
        messages.append(check.update(10 * index, model, ema))
    return messages


@pytest.mark.parametrize("resumed_at", range(6))
def test_overfitting_is_reported_once_also_after_a_resume(resumed_at: int) -> None:
    messages = overfitting_messages(OVERFITTING, resumed_at)
    assert [message is not None for message in messages] == [False, False, False, False, True, False]
    assert "0.254, after 0.199 at step 20" in str(messages[4])


@pytest.mark.parametrize(
    "healthy", [[0.199, 0.135, 0.122, 0.117, 0.113, 0.111, 0.113], [0.2, 0.1, 0.13, 0.1, 0.13, 0.1]]
)
def test_a_falling_or_unsteady_loss_is_not_overfitting(healthy: list[float]) -> None:
    assert overfitting_messages(healthy) == [None] * len(healthy)


@pytest.mark.parametrize("resumed_at", range(5))
def test_a_slow_ema_is_reported_once_also_after_a_resume(resumed_at: int) -> None:
    messages = ema_messages(SLOW_EMA, resumed_at)
    assert [message is not None for message in messages] == [False, False, True, False, False]
    assert "from 0.3 to 0.22" in str(messages[2])
    assert "ema_warmup" in str(messages[2])


def test_an_ema_that_keeps_up_is_not_reported() -> None:
    assert ema_messages([(0.30, 0.30), (0.25, 0.28), (0.22, 0.25), (0.20, 0.21)]) == [None] * 4


def test_an_ema_is_not_behind_a_model_that_learns_nothing() -> None:
    assert ema_messages([(0.30, 0.30), (0.296, 0.30), (0.29, 0.30), (0.31, 0.30)]) == [None] * 4
