"""Averages that stay behind are told, once; those that keep up are not."""

from __future__ import annotations

import json

import pytest

from cogflow.training.ema_check import Averages


def follow(pairs: list[tuple[float, float]], cut: int = 0) -> list[str | None]:
    averages, told = Averages(), []
    for place, (model, averaged) in enumerate(pairs):
        if cut and place == cut:
            averages = Averages(json.loads(json.dumps(averages.state())))
        told.append(averages.update(10 * place, model, averaged))
    return told


SLOW = [(0.30, 0.30), (0.25, 0.299), (0.22, 0.298), (0.20, 0.297), (0.19, 0.296)]


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4])
def test_slow_averages_are_told_once_also_after_a_resume(cut: int) -> None:
    told = follow(SLOW, cut)
    assert [line is not None for line in told] == [False, False, True, False, False]
    assert "from 0.3 to 0.22" in str(told[2]) and "ema_warmup" in str(told[2])


def test_averages_that_keep_up_are_not() -> None:
    assert follow([(0.30, 0.30), (0.25, 0.28), (0.22, 0.25), (0.20, 0.21)]) == [None] * 4


def test_a_model_that_learns_nothing_leaves_nothing_behind() -> None:
    assert follow([(0.30, 0.30), (0.296, 0.30), (0.29, 0.30), (0.31, 0.30)]) == [None] * 4
