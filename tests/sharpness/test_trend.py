"""The trend test: no finding without damage or while the model learns, an early finding by name when detail is lost,
exact resume.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from cogflow.sharpness.spectrum import Band
from cogflow.sharpness.trend import ALARM, TESTED_BANDS, WARNING, Trend, angle

EXPECTED = {1: 0.85, 2: 0.6, 3: 0.35, 4: 0.1}
Change = Callable[[int, int], tuple[float, float]]


def steps(count: int, seed: int = 0, change: Change = lambda step, quarter: (0.0, 0.0), clips: int = 4):
    """Bands and clips of ``count`` steps. ``change(step, quarter)``: what is added to the recovered share and to the
    energy beyond it, in the deviations that one clip has on a frozen tiny model."""
    rng = np.random.default_rng([seed, 0x7E57])
    for step in range(1, count + 1):
        numbers = np.bincount(rng.integers(1, 5, clips), minlength=5)
        bands = {}
        for quarter in (q for q in EXPECTED if numbers[q]):
            lost, over = change(step, quarter)
            for band in TESTED_BANDS:
                noise, other = rng.standard_normal(2) / np.sqrt(numbers[quarter])
                turned = angle(EXPECTED[quarter]) + 0.15 * (1.0 + noise + lost)
                recovered = float(np.sin(np.clip(turned, 0.0, np.pi / 2)) ** 2)
                beyond = float(np.clip(0.08 * (other + over), -0.9, 0.9))
                bands[band, quarter] = Band(recovered, recovered * (1 + beyond) / (1 - beyond), EXPECTED[quarter])
        yield step, bands, {quarter: float(numbers[quarter]) for quarter in EXPECTED}


def run(trend: Trend, given) -> tuple[list, list[dict[str, float]]]:
    changes, values = [], []
    for step, bands, clips in given:
        point = trend.update(step, bands, clips)
        changes += point.changes
        values.append(point.values)
    return changes, values


def test_runs_without_damage_have_no_finding() -> None:
    """Twenty-four runs of 300 steps, of 1 to 8 clips a step."""
    found = [seed for seed in range(24) if run(Trend(), steps(300, seed, clips=(1, 2, 4, 8)[seed % 4]))[0]]
    assert found == []


def test_a_prediction_that_improves_raises_no_alarm() -> None:
    """The recovered share rises; a prediction that had too much or too little energy comes to what is recovered."""
    for start in (3.0, -3.0):

        def better(step: int, quarter: int, start: float = start) -> tuple[float, float]:
            return min(step, 100) / 20, start * max(0.0, 1 - step / 100)

        assert run(Trend(), steps(300, 1, better))[0] == []


@pytest.mark.parametrize(
    ("defect", "size"),
    [("losing", (-2.0, 0.0)), ("softening", (0.0, -2.0)), ("inventing", (0.0, 2.0))],
    ids=["losing", "softening", "inventing"],
)
def test_a_lasting_change_of_two_deviations_is_found_within_twenty_steps(
    defect: str, size: tuple[float, float]
) -> None:
    for seed in range(5):
        changes, _ = run(Trend(), steps(140, seed, lambda step, quarter: size if step > 100 else (0.0, 0.0)))
        first = [change for change in changes if change.defect == defect]
        assert first and 100 < first[0].step <= 120 and {change.defect for change in changes} == {defect}, changes
        assert defect != "losing" or "recovers less" in first[0].line()


def test_finding_names_the_quarter_of_the_change() -> None:
    changes, values = run(
        Trend(), steps(160, 3, lambda step, quarter: (-4.0, 0.0) if step > 100 and quarter == 2 else (0.0, 0.0))
    )
    assert changes and changes[0].quarter == 2
    assert max((values[-1][f"z_losing_high_q{q}"], q) for q in EXPECTED)[1] == 2


def test_damage_in_the_first_steps_does_not_enter_the_reference() -> None:
    changes, _ = run(Trend(), steps(40, 0, lambda step, quarter: (-6.0, 0.0) if step > 12 else (0.0, 0.0), clips=8))
    assert changes and changes[0].defect == "losing" and changes[0].step <= 20


def test_each_defect_is_reported_once_and_the_first_warning_stays() -> None:
    changes, values = run(
        Trend(), steps(300, 0, lambda step, quarter: (-3.0 if step > 100 and step % 80 > 20 else 0.0, 0.0))
    )
    found = [(change.defect, change.level) for change in changes]
    assert len(found) == len(set(found)) and ("losing", "alarm") in found
    assert {value["first_warning"] for value in values if "first_warning" in value} == {changes[0].step}
    for value in values:
        if "z" in value:
            assert value["level"] == (3.0 if value["z"] >= ALARM else 2.0 if value["z"] >= WARNING else 0.0)


@pytest.mark.parametrize("cut", [2, 15, 60, 110])
def test_a_resumed_trend_continues_exactly(cut: int) -> None:
    given = list(steps(150, 5, lambda step, quarter: (-2.0, 0.0) if step > 100 else (0.0, 0.0)))
    whole = run(Trend(), given)
    first = Trend()
    head = run(first, given[:cut])
    tail = run(Trend(json.loads(json.dumps(first.state()))), given[cut:])
    assert (head[0] + tail[0], head[1] + tail[1]) == whole


def test_an_anchor_from_held_out_clips_shows_damage_in_the_first_steps() -> None:
    """The learning rate is too high from the first step on: without the anchor, damage is the standard."""
    given = list(steps(60, 0, lambda step, quarter: (-3.0, 0.0) if step > 3 else (0.0, 0.0), clips=8))
    (_, healthy, _) = next(iter(steps(1, 7, clips=400)))
    anchored = Trend()
    anchored.anchor(healthy)
    changes, values = run(anchored, given)
    assert changes and changes[0].defect == "losing" and changes[0].step <= 12 and values[-1]["level"] == 3.0
    assert not [change for change in run(Trend(), given)[0] if change.step <= 12]


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
