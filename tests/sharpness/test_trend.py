"""The sequential test: silent while nothing happens or the model learns, named and early when detail goes, the same after a resume."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from cogflow.sharpness.spectrum import Band
from cogflow.sharpness.trend import ALARM, FOLLOWED, WARNING, Trend, angle

EXPECTED = {1: 0.85, 2: 0.6, 3: 0.35, 4: 0.1}
Change = Callable[[int, int], tuple[float, float]]


def steps(count: int, seed: int = 0, change: Change = lambda step, quarter: (0.0, 0.0), clips: int = 4):
    """Bands and clips of ``count`` steps. ``change(step, quarter)``: what is added to the recovered share and to the energy beyond it,
    in the deviations that one clip has on a frozen tiny model."""
    rng = np.random.default_rng([seed, 0x7E57])
    for step in range(1, count + 1):
        numbers = np.bincount(rng.integers(1, 5, clips), minlength=5)
        bands = {}
        for quarter in (q for q in EXPECTED if numbers[q]):
            lost, over = change(step, quarter)
            for band in FOLLOWED:
                noise, other = rng.standard_normal(2) / np.sqrt(numbers[quarter])
                turned = angle(EXPECTED[quarter]) + 0.15 * (1.0 + noise + lost)
                recovered = float(np.sin(np.clip(turned, 0.0, np.pi / 2)) ** 2)
                beyond = float(np.clip(0.08 * (other + over), -0.9, 0.9))
                bands[band, quarter] = Band(recovered, recovered * (1 + beyond) / (1 - beyond), EXPECTED[quarter])
        yield step, bands, {quarter: float(numbers[quarter]) for quarter in EXPECTED}


def run(trend: Trend, given) -> tuple[list, list[dict[str, float]]]:
    moves, values = [], []
    for step, bands, clips in given:
        reading = trend.update(step, bands, clips)
        moves += reading.moves
        values.append(reading.values)
    return moves, values


def test_nothing_is_said_when_nothing_happens() -> None:
    """Twenty-four runs of 300 steps, of 1 to 8 clips a step."""
    told = [seed for seed in range(24) if run(Trend(), steps(300, seed, clips=(1, 2, 4, 8)[seed % 4]))[0]]
    assert told == []


def test_learning_is_not_damage() -> None:
    """The recovered share rises; a prediction that had too much or too little energy comes to what is recovered."""
    for start in (3.0, -3.0):

        def better(step: int, quarter: int, start: float = start) -> tuple[float, float]:
            return min(step, 100) / 20, start * max(0.0, 1 - step / 100)

        assert run(Trend(), steps(300, 1, better))[0] == []


@pytest.mark.parametrize(
    ("kind", "size"),
    [("losing", (-2.0, 0.0)), ("softening", (0.0, -2.0)), ("inventing", (0.0, 2.0))],
    ids=["losing", "softening", "inventing"],
)
def test_a_lasting_change_of_two_deviations_is_named_within_twenty_steps(kind: str, size: tuple[float, float]) -> None:
    for seed in range(5):
        moves, _ = run(Trend(), steps(140, seed, lambda step, quarter: size if step > 100 else (0.0, 0.0)))
        first = [move for move in moves if move.kind == kind]
        assert first and 100 < first[0].step <= 120 and {move.kind for move in moves} == {kind}, moves
        assert kind != "losing" or "recovers less" in first[0].line()


def test_the_quarter_where_it_happens_is_named() -> None:
    moves, values = run(
        Trend(), steps(160, 3, lambda step, quarter: (-4.0, 0.0) if step > 100 and quarter == 2 else (0.0, 0.0))
    )
    assert moves and moves[0].quarter == 2
    assert max((values[-1][f"z_losing_high_q{q}"], q) for q in EXPECTED)[1] == 2


def test_damage_in_the_first_steps_does_not_become_the_standard() -> None:
    moves, _ = run(Trend(), steps(40, 0, lambda step, quarter: (-6.0, 0.0) if step > 12 else (0.0, 0.0), clips=8))
    assert moves and moves[0].kind == "losing" and moves[0].step <= 20


def test_each_kind_is_told_once_and_the_first_warning_stays() -> None:
    moves, values = run(
        Trend(), steps(300, 0, lambda step, quarter: (-3.0 if step > 100 and step % 80 > 20 else 0.0, 0.0))
    )
    told = [(move.kind, move.level) for move in moves]
    assert len(told) == len(set(told)) and ("losing", "alarm") in told
    assert {value["first_warning"] for value in values if "first_warning" in value} == {moves[0].step}
    for value in values:
        if "z" in value:
            assert value["level"] == (3.0 if value["z"] >= ALARM else 2.0 if value["z"] >= WARNING else 0.0)


@pytest.mark.parametrize("cut", [2, 15, 60, 110])
def test_a_resumed_test_goes_on_exactly(cut: int) -> None:
    given = list(steps(150, 5, lambda step, quarter: (-2.0, 0.0) if step > 100 else (0.0, 0.0)))
    whole = run(Trend(), given)
    first = Trend()
    head = run(first, given[:cut])
    tail = run(Trend(json.loads(json.dumps(first.state()))), given[cut:])
    assert (head[0] + tail[0], head[1] + tail[1]) == whole


def test_held_out_clips_seen_before_the_first_step_show_damage_in_the_first_steps() -> None:
    """The learning rate is too high from the first step on: without the anchor, damage is the standard."""
    given = list(steps(60, 0, lambda step, quarter: (-3.0, 0.0) if step > 3 else (0.0, 0.0), clips=8))
    (_, healthy, _) = next(iter(steps(1, 7, clips=400)))
    anchored = Trend()
    anchored.anchor(healthy)
    moves, values = run(anchored, given)
    assert moves and moves[0].kind == "losing" and moves[0].step <= 12 and values[-1]["level"] == 3.0
    assert not [move for move in run(Trend(), given)[0] if move.step <= 12]


def test_an_anchor_that_is_off_by_a_deviation_is_no_alarm() -> None:
    """Held-out clips have a few timesteps of each quarter: their mean is off by up to a deviation of one clip."""
    for off in (-1.0, 1.0):

        def moved(step: int, quarter: int, off: float = off) -> tuple[float, float]:
            return off, off

        (_, shifted, _) = next(iter(steps(1, 7, moved, clips=400)))
        for seed in range(4):
            anchored = Trend()
            anchored.anchor(shifted)
            assert run(anchored, steps(200, seed, clips=(1, 2, 4, 8)[seed]))[0] == []
