"""What is a spike, what is not, and what too many left-out steps are."""

from __future__ import annotations

import json
import math
import random

import pytest

from cogflow.training.guards import EARLIEST, MOST_SKIPPED, WINDOW, Skipped, Spikes, not_finite_line


def noisy(count: int, seed: int = 0, level: float = 0.2, spread: float = 0.3) -> list[float]:
    """Losses of single clips at random timesteps: they spread by factors."""
    drawn = random.Random(seed)
    return [level * math.exp(drawn.gauss(0, spread)) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_loss_has_no_spike_in_three_thousand_steps(seed: int) -> None:
    spikes = Spikes()
    assert [value for value in noisy(3000, seed) if spikes.update(value) is not None] == []


def test_a_spike_is_told_with_its_deviations_and_not_learned_from() -> None:
    spikes = Spikes()
    for value in noisy(WINDOW):
        spikes.update(value)
    sigmas = spikes.update(0.2 * math.exp(0.3 * 10))
    assert sigmas == pytest.approx(10, abs=1.5)
    assert spikes.update(0.2 * math.exp(0.3 * 10)) == sigmas, "the window is what it was"


def test_nothing_is_a_spike_before_there_is_something_to_hold_it_against() -> None:
    spikes = Spikes()
    for value in noisy(EARLIEST - 1):
        spikes.update(value)
    assert spikes.update(1e6) is None


def test_a_loss_that_hardly_moves_does_not_spike_by_a_hair() -> None:
    spikes = Spikes()
    for _ in range(WINDOW):
        spikes.update(0.2)
    assert spikes.update(0.21) is None and spikes.update(0.3) is not None


def test_a_new_level_is_a_spike_for_a_quarter_of_the_window_and_then_how_things_are() -> None:
    spikes = Spikes()
    for value in noisy(WINDOW, spread=0.05):
        spikes.update(value)
    told = [spikes.update(value) is not None for value in noisy(2 * WINDOW, seed=1, level=1.0, spread=0.05)]
    assert all(told[: WINDOW // 4]) and not any(told[WINDOW:])


def test_its_state_goes_through_a_checkpoint() -> None:
    one = Spikes()
    values = noisy(200)
    for value in values[:100]:
        one.update(value)
    two = Spikes(json.loads(json.dumps(one.state())))
    assert [one.update(value) for value in values[100:]] == [two.update(value) for value in values[100:]]
    assert one.state() == two.state()


def test_left_out_steps_are_counted_in_all_and_in_a_row() -> None:
    skipped = Skipped()
    for applied in [True, False, False, True, *[False] * (MOST_SKIPPED - 1)]:
        skipped.update(applied)
    assert (skipped.total, skipped.in_a_row, skipped.too_many) == (MOST_SKIPPED + 1, MOST_SKIPPED - 1, False)
    skipped.update(False)
    assert skipped.too_many and Skipped(json.loads(json.dumps(skipped.state()))).too_many


def test_the_line_names_rank_and_clips_or_says_that_it_is_the_gradient() -> None:
    assert "rank 1: a.mp4, b.mp4)" in not_finite_line(7, [[], ["a.mp4", "b.mp4"]])
    assert "gradient of step 7" in not_finite_line(7, [[], []])
