"""Test the robust location, moderated t, normal scores and bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cogflow.sharpness.robust_statistics import interval, location, normal_score


def test_location_is_near_the_mean_and_resists_an_outlier() -> None:
    tame = np.array([-0.2, -0.1, 0.0, 0.1, 0.2])
    assert location(tame, np.array(0.2), 8).centre == pytest.approx(tame.mean(), abs=1e-9)
    wild = location(np.append(tame, 50.0), np.array(0.2), 8)
    assert abs(wild.centre) < 50 / 6 * 0.75  # the mean would be 8.3
    assert wild.deviation > 5  # and such a spread is believed: no alarm from it


def test_location_is_more_efficient_than_the_median() -> None:
    values = np.random.default_rng(0).normal(size=(4000, 8))
    huber = location(values, np.ones(4000), 8).centre
    assert huber.std() < 0.92 * np.median(values, axis=1).std()


def test_prior_counts_as_further_values() -> None:
    same = np.full(3, 0.5)
    found = location(same, np.array(0.3), 6)
    assert found.df == 8
    assert found.deviation == pytest.approx(np.sqrt(6 * 0.09 / 8))
    assert found.error == pytest.approx(found.deviation / np.sqrt(3))
    assert location(np.array([0.5]), np.array(0.3), 6).deviation == pytest.approx(0.3)  # one value: the prior alone


def test_location_of_rows_equals_that_of_each_row() -> None:
    values = np.random.default_rng(1).normal(size=(2, 3, 5))
    prior = np.array([0.5, 1.0, 2.0])
    both = location(values, prior, 4)
    for run in range(2):
        for channel in range(3):
            assert both.centre[run, channel] == pytest.approx(location(values[run, channel], prior[channel], 4).centre)


def test_location_refuses_empty_input() -> None:
    with pytest.raises(ValueError, match="nothing to locate"):
        location(np.zeros((2, 0)), np.ones(2), 4)
    with pytest.raises(ValueError, match="nothing to locate"):
        interval(np.array([]))


@pytest.mark.parametrize("df", [4.0, 11.0, 30.0])
def test_normal_score_has_the_tail_probability_of_t(df: float) -> None:
    t = np.array([-8.0, -2.0, 0.0, 1.0, 5.0])
    assert stats.norm.sf(normal_score(t, df)) == pytest.approx(stats.t.sf(t, df), rel=1e-6)
    assert np.isfinite(normal_score(np.array([1e12, -1e12]), df)).all()


def test_values_with_larger_gain_count_for_more() -> None:
    gains = np.array([0.5, 1.0, 1.0, 2.0])
    exact = location(-0.7 * gains, np.array(0.3), 8, gains)
    assert exact.centre == pytest.approx(-0.7)
    assert exact.deviation == pytest.approx(np.sqrt(8 * 0.09 / 11))  # what the gains explain is no spread
    random = np.random.default_rng(3)
    drawn = -0.7 * gains + random.normal(0, 0.3, (4000, 4))
    with_gains, without = location(drawn, np.full(4000, 0.3), 8, gains), location(drawn, np.full(4000, 0.3), 8)
    assert (with_gains.centre / with_gains.error).mean() < (without.centre / without.error).mean()
    assert with_gains.centre.std() == pytest.approx(0.3 / np.sqrt((gains**2).sum()), rel=0.1)


def test_bootstrap_interval_covers_the_median() -> None:
    random, hits = np.random.default_rng(2), 0
    for seed in range(200):
        low, high = interval(random.normal(1.0, 1.0, 25), of=np.mean, draws=300, seed=seed)
        hits += low <= 1.0 <= high
    assert 175 <= hits <= 199  # 95 % by intention; percentiles are a little short on 25 values
    assert interval(np.array([0.3])) == (0.3, 0.3)
