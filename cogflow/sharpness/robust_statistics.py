"""Statistics over a few prompts: robust location of changes, its error, normal scores and bootstrap intervals.

Arrays are float64. The last axis holds the prompts, the axes before it the metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special

HUBER = 1.345  # deviations; 95 % as efficient as the mean where nothing is wild (Huber 1964)
ITERATIONS = 5


@dataclass(frozen=True)
class Location:
    """``centre``, its standard ``error``, the ``deviation`` of one value and its degrees of freedom ``df``."""

    centre: np.ndarray
    error: np.ndarray
    deviation: np.ndarray
    df: float


def location(values: np.ndarray, prior: np.ndarray, prior_df: float, gains: np.ndarray | None = None) -> Location:
    """Huber's M-estimate of ``values`` ``[..., n]`` with a moderated deviation.

    ``s^2 = (prior_df prior^2 + sum (value - centre)^2) / (prior_df + n - 1)``: the prior ``[...]`` counts like
    ``prior_df`` values more, so that three prompts that agree by chance give no alarm, and a spread far above it is
    believed (Smyth 2004, limma). With ``gains`` (as ``values``, above 0) value i is expected at ``gain_i * centre``:
    those that can tell more count for more. Raises ``ValueError`` without values.
    """
    values = np.asarray(values, dtype=np.float64)
    n = values.shape[-1]
    if n == 0:
        raise ValueError("there is nothing to locate")
    prior, gain = np.asarray(prior, dtype=np.float64), np.ones(1) if gains is None else gains
    df, power = prior_df + n - 1, np.broadcast_to(gain * gain, values.shape).sum(axis=-1)
    centre = np.median(values / gain, axis=-1)
    for _ in range(ITERATIONS):
        rest = values - gain * centre[..., None]
        deviation = np.sqrt((prior_df * prior**2 + (rest**2).sum(axis=-1)) / df)
        # A value beyond HUBER deviations pulls no harder than one that lies there.
        weight = np.minimum(1.0, HUBER * deviation[..., None] / np.maximum(np.abs(rest), 1e-300))
        centre = (weight * gain * values).sum(axis=-1) / (weight * gain * gain).sum(axis=-1)
    return Location(centre, deviation / np.sqrt(power), deviation, df)


def normal_score(t: np.ndarray, df: float) -> np.ndarray:
    """Return the z of a normal distribution that is as unlikely as ``t`` of a t distribution.

    It is within -37..37, the range of float64.
    """
    t = np.asarray(t, dtype=np.float64)
    tail = np.maximum(special.stdtr(df, -np.abs(t)), 1e-300)
    return np.asarray(np.sign(t) * -special.ndtri(tail))


def interval(
    values: np.ndarray,
    *,
    share: float = 0.95,
    draws: int = 1000,
    of: Callable[..., np.ndarray] = np.median,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the bootstrap interval (percentiles) of ``of(values)`` for ``values`` ``[n]``; for one value, it twice.

    ``of`` takes ``axis``.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("there is nothing to locate")
    picks = np.random.default_rng(seed).integers(0, values.size, (draws, values.size))
    low, high = np.quantile(of(values[picks], axis=1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
