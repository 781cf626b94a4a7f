"""A held-out loss that rises for good is told, once."""

from __future__ import annotations

import json

import pytest

from cogflow.training.overfitting import Overfitting


def follow(values: list[float], cut: int = 0) -> list[str | None]:
    follower, told = Overfitting(), []
    for place, value in enumerate(values):
        if cut and place == cut:
            follower = Overfitting(json.loads(json.dumps(follower.state())))
        told.append(follower.update(20 * place, value))
    return told


BY_HEART = [0.214, 0.199, 0.220, 0.239, 0.254, 0.275]
"""Four clips, 100 steps."""


@pytest.mark.parametrize("cut", range(6))
def test_learning_by_heart_is_told_once_also_after_a_resume(cut: int) -> None:
    told = follow(BY_HEART, cut)
    assert [line is not None for line in told] == [False, False, False, False, True, False]
    assert "0.254, after 0.199 at step 20" in str(told[4])


@pytest.mark.parametrize(
    "healthy", [[0.199, 0.135, 0.122, 0.117, 0.113, 0.111, 0.113], [0.2, 0.1, 0.13, 0.1, 0.13, 0.1]]
)
def test_what_falls_or_wavers_is_not(healthy: list[float]) -> None:
    assert follow(healthy) == [None] * len(healthy)
