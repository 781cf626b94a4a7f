"""The ladder: rungs 0 to 5, each held against the one before it, as log ratios with intervals. Panels and facts in, table and findings out.

========  ==========================================  ================================  =========================================
rung      frames                                      held against                      a fall means
========  ==========================================  ================================  =========================================
0         training clips at their own size            nothing                           the data itself is soft
1         the clips as the loader hands them over     0, clip by clip                   the loader softens
2         the clips through the VAE and back          1, clip by clip                   VAE: weights, precision, scaling, tiling
3         samples before the first step               2, as distributions               the starting model or the sampler
4         samples of a later step                     3, prompt by prompt               training
5         samples of the exported folder              4, prompt by prompt, frame by frame    conversion or assembly
========  ==========================================  ================================  =========================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cogflow.sharpness.metrics import METRICS, change
from cogflow.sharpness.noise_model import METRIC_NOISE
from cogflow.sharpness.verdict import BLUR_CHANNELS

NAMES = {0: "source", 1: "clip", 2: "roundtrip", 3: "base", 4: "tuned", 5: "exported"}
RESAMPLES = 1000
Panels = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Interval:
    """A change: the median over the pairs (or the difference of the groups' medians), and its 95 % bootstrap interval."""

    size: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.size:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class RungFinding:
    """Something is wrong at ``rung``. ``kind`` as in ``verdict.KINDS``; ``level`` warning or alarm; ``line`` says it in one sentence."""

    rung: int
    kind: str
    level: str
    line: str
    channel: str = ""
    size: float | None = None
    field: str = ""
    """Of a config, where one is at fault."""

    @property
    def key(self) -> str:
        """The same for the same trouble, however large."""
        return f"{self.rung}/{self.kind}/{self.level}/{self.field or self.channel}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """One rung of the table. ``changes`` by channel, and of ``blur``, the mean of the blur channels; empty without a partner."""

    rung: int
    count: int
    against: int | None
    paired: bool
    pairs: int
    changes: dict[str, Interval]
    psnr: float | None = None
    verdict: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "name": NAMES[self.rung]}


def changes(candidate: Panels, reference: Panels, paired: bool) -> tuple[dict[str, Interval], int]:
    """Every shared channel's change and ``blur``'s, and over how many pairs.

    Paired: over the names that both have. Unpaired: difference of the medians of two groups. Panels need not have every channel; values
    that are no numbers are left out.
    """
    shared = [name for name in candidate if name in reference]
    if (paired and not shared) or not candidate or not reference:
        return {}, 0
    found: dict[str, Interval] = {}
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for channel in METRICS:
        if paired:
            pairs = [
                (candidate[n][channel], reference[n][channel])
                for n in shared
                if _has(candidate[n], channel) and _has(reference[n], channel)
            ]
            values = np.array([change(channel, one, other) for one, other in pairs])
            columns[channel] = values, np.zeros(0)
        else:
            # On the channel's own scale: a log where it has one.
            columns[channel] = _scaled(candidate, channel), _scaled(reference, channel)
        if len(columns[channel][0]) and (paired or len(columns[channel][1])):
            found[channel] = _interval(*columns[channel], paired)
    present = [channel for channel in BLUR_CHANNELS if channel in found]
    sides = [[columns[channel][side] for channel in present] for side in (0, 1)]
    if present and all(len({len(column) for column in side}) == 1 for side in sides):
        found["blur"] = _interval(np.mean(sides[0], axis=0), np.mean(sides[1], axis=0), paired)
    return found, len(shared) if paired else min(len(candidate), len(reference))


def of_changes(pairs: Panels) -> dict[str, Interval]:
    """Intervals of changes that were worked out before, by pair and channel."""
    found = {}
    for channel in METRICS:
        values = np.array([one[channel] for one in pairs.values() if _has(one, channel)])
        if len(values):
            found[channel] = _interval(values, np.zeros(0), True)
    present = [channel for channel in BLUR_CHANNELS if channel in found]
    if present:
        blur = np.array(
            [
                np.mean([one[channel] for channel in present])
                for one in pairs.values()
                if all(_has(one, c) for c in present)
            ]
        )
        found["blur"] = _interval(blur, np.zeros(0), True)
    return found


def blur_z(found: Mapping[str, Interval]) -> float:
    """The blur channels' mean change in null deviations of one pair (variants of the same content); below zero is blurrier."""
    present = [channel for channel in BLUR_CHANNELS if channel in found]
    return (
        float(np.mean([found[channel].size / METRIC_NOISE[channel].variants for channel in present]))
        if present
        else 0.0
    )


def _has(panel: Mapping[str, float], channel: str) -> bool:
    value = panel.get(channel)
    return value is not None and np.isfinite(value)


def _scaled(panels: Panels, channel: str) -> np.ndarray:
    return np.array([change(channel, panel[channel], 0.0) for panel in panels.values() if _has(panel, channel)])


def _interval(one: np.ndarray, other: np.ndarray, paired: bool) -> Interval:
    random = np.random.default_rng(0)

    def medians(values: np.ndarray) -> np.ndarray:
        return np.median(values[random.integers(0, len(values), (RESAMPLES, len(values)))], axis=1)

    size = float(np.median(one)) - (0.0 if paired else float(np.median(other)))
    drawn = medians(one) - (0.0 if paired else medians(other))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(size, float(low), float(high))
