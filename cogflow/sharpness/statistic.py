"""Statistics over a handful of prompts: where the middle of some changes lies, how sure that is, and how unlikely by chance.

Arrays are float64; the last axis are the prompts, the axes before it run through channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

HUBER = 1.345  # deviations; 95 % as efficient as the mean where nothing is wild (Huber 1964)
ITERATIONS = 8
LARGEST = 99.0  # z beyond which numbers mean nothing more


@dataclass(frozen=True)
class Location:
    """``centre``, its standard ``error``, the ``deviation`` of one value and its degrees of freedom ``df``."""

    centre: np.ndarray
    error: np.ndarray
    deviation: np.ndarray
    df: float


def location(values: np.ndarray, prior: np.ndarray, prior_df: float) -> Location:
    """Huber's M-estimate of ``values`` ``[..., n]`` with a moderated deviation.

    ``s^2 = (prior_df prior^2 + sum (value - centre)^2) / (prior_df + n - 1)``: the prior ``[...]`` counts like ``prior_df`` values more,
    so that three prompts that agree by chance give no alarm, and a spread far above it is believed (Smyth 2004, limma). Raises
    ``ValueError`` without values.
    """
    values = np.asarray(values, dtype=np.float64)
    n = values.shape[-1]
    if n == 0:
        raise ValueError("there is nothing to locate")
    prior = np.asarray(prior, dtype=np.float64)
    df = prior_df + n - 1
    centre = np.median(values, axis=-1)
    for _ in range(ITERATIONS):
        rest = values - centre[..., None]
        deviation = np.sqrt((prior_df * prior**2 + (rest**2).sum(axis=-1)) / df)
        # A value beyond HUBER deviations pulls no harder than one that lies there.
        weight = np.minimum(1.0, HUBER * deviation[..., None] / np.maximum(np.abs(rest), 1e-300))
        centre = (weight * values).sum(axis=-1) / weight.sum(axis=-1)
    return Location(centre, deviation / np.sqrt(n), deviation, df)


def normal_score(t: np.ndarray, df: float) -> np.ndarray:
    """The z of a normal distribution that is as unlikely as ``t`` of a t distribution; within -99..99."""
    t = np.asarray(t, dtype=np.float64)
    tail = stats.t.logsf(np.abs(t), df)
    return np.sign(t) * np.minimum(-special.ndtri_exp(np.maximum(tail, -4900.0)), LARGEST)


def below_zero(mean: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of ``min(0, X)`` for X normal with ``mean`` and ``error``: the lower end of an interval that starts at 0
    and ends somewhere near ``mean``. Far above 0 both are 0; far below it they are ``mean`` and ``error``."""
    mean, error = np.asarray(mean, dtype=np.float64), np.asarray(error, dtype=np.float64)
    sure = np.maximum(error, 1e-300)
    a = np.clip(-mean / sure, -37.0, 37.0)
    inside, density = special.ndtr(a), np.exp(-0.5 * a * a) / np.sqrt(2 * np.pi)
    first = mean * inside - sure * density
    second = (mean**2 + sure**2) * inside - mean * sure * density
    return first, np.sqrt(np.maximum(second - first**2, 0.0))


def interval(
    values: np.ndarray, *, share: float = 0.95, draws: int = 1000, of: Callable[..., np.ndarray] = np.median, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval (percentiles) of ``of(values)`` for ``values`` ``[n]``; for one, the value twice. ``of`` takes ``axis``."""
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("there is nothing to locate")
    picks = np.random.default_rng(seed).integers(0, values.size, (draws, values.size))
    low, high = np.quantile(of(values[picks], axis=1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
