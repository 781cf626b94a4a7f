"""The sequential test on the per-step indicator: does training lose fine detail compared with its own first steps?

Each step gives, per band and quarter of the timesteps, what :mod:`cogflow.sharpness.spectrum` sums over some clips.
Three defects are tested, each in the bands TESTED_BANDS:

* ``losing``: the recovered share falls below its start, after subtracting what a Wiener filter explains;
* ``softening``: the prediction has less energy than is recovered (a blurred prediction), and less so than at the start;
* ``inventing``: it has more energy than is recovered (grain, artefacts, over-sharpening), and more so than at the
  start.

A step's value is standardised by its quarter with mean and deviation of the first REFERENCE_STEPS steps that had a clip
there. Where the held-out clips were evaluated before the first step, the mean starts from them, so that damage in the
first steps is seen; no step enters the reference while something seems wrong. The deviation is moderated by a prior.
The quarters are added up to one z per step. The statistic is an exponentially weighted mean of those over its own
deviation, which includes the uncertainty of the reference. A constant level does not accumulate; a drift does show. A
rise of the recovered share is learning and is never reported, and neither is a prediction whose energy approaches what
is recovered.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cogflow.sharpness.spectrum import QUARTERS, Band

TREND_DEFECTS = ("losing", "softening", "inventing")
TESTED_BANDS = ("mid", "high", "fast")
REFERENCE_STEPS = 20  # per quarter
EARLIEST = 6  # values a quarter needs before it counts
WEIGHT = 0.1  # of a new step in the mean
CLIP = 2.5  # deviations beyond which a value of the reference is cut
_ENERGY = (0.05, 0.08, 0.11, 0.22)
PRIOR_DEVIATION = {"losing": (0.12, 0.15, 0.17, 0.2), "softening": _ENERGY, "inventing": _ENERGY}
"""Deviation of one clip, by quarter, about what a frozen tiny model shows (0.09 to 0.26 and 0.03 to 0.25)."""
PRIOR_WEIGHT = 6.0  # values that the prior counts for
ANCHOR_CLIPS = (
    2.0  # that the held-out clips' mean counts for: their few timesteps miss a quarter's mean by up to a deviation
)
SUSPECT = 3.5  # a step with a larger statistic does not enter the reference
STEP_CLIP = 6.0  # deviations beyond which one step's value in one quarter is cut: one odd clip is no trend
WARNING, ALARM = 4.5, 6.0
_EMPTY: dict[str, float] = {"anchored": 0, "n": 0, "clips": 0.0, "mean": 0.0, "squares": 0.0, "e": 0.0, "k": 0}


@dataclass(frozen=True)
class BandChange:
    """A change seen at ``step``: ``defect`` of TREND_DEFECTS, ``band`` and ``quarter`` (1 least noise) where it is
    largest, ``z`` above 0.
    """

    defect: str
    level: str  # warning | alarm
    step: int
    band: str
    quarter: int
    z: float

    def line(self) -> str:
        """Return one plain sentence."""
        what = {
            "losing": f"the model recovers less of the {self.band} band than in its first steps",
            "softening": f"the predictions' {self.band} band has less energy than is known: they are getting softer",
            "inventing": f"the predictions' {self.band} band has more energy than is known: detail that is not there",
        }[self.defect]
        return f"{what}, most in quarter {self.quarter} of the noise levels (z {self.z:.1f}, since step {self.step})"


@dataclass(frozen=True)
class TrendPoint:
    """``values``: flat numbers to log; ``changes``: new findings, at most one per defect and level in a run."""

    values: dict[str, float]
    changes: list[BandChange]


class Trend:
    """The test. Its state is a plain JSON object that :meth:`state` returns and the constructor takes, so a resumed run
    continues exactly.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        given = copy.deepcopy(dict(state or {}))
        self._quarters: dict[str, dict[str, float]] = given.get("quarters", {})
        self._means: dict[str, list[float]] = given.get("means", {})
        # Checkpoints of older versions have the reported changes as "told".
        self._reported: dict[str, int] = given.get("reported", given.get("told", {}))

    def state(self) -> dict[str, Any]:
        """Return the state as a plain JSON object."""
        return copy.deepcopy({"quarters": self._quarters, "means": self._means, "reported": self._reported})

    def anchor(self, bands: Mapping[tuple[str, int], Band]) -> None:
        """Start the reference from ``bands`` of the held-out clips before the first step. Call it before the first
        :meth:`update`.
        """
        for defect in TREND_DEFECTS:
            for band in TESTED_BANDS:
                for quarter in range(1, QUARTERS + 1):
                    if (band, quarter) in bands:
                        mean = indicator(defect, bands[band, quarter])
                        anchored = {**_EMPTY, "anchored": 1, "clips": ANCHOR_CLIPS, "mean": mean}
                        self._quarters[f"{defect} {band} {quarter}"] = anchored

    def update(self, step: int, bands: Mapping[tuple[str, int], Band], clips: Mapping[int, float]) -> TrendPoint:
        """Take in one step: ``bands`` by name and quarter, ``clips``: the number of clips by quarter."""
        values: dict[str, float] = {}
        worst: dict[str, tuple[float, str, int]] = {}
        for defect in TREND_DEFECTS:
            for band in TESTED_BANDS:
                z = self._statistic(defect, band, _indicators(defect, band, bands, clips))
                if z is None:
                    continue
                values[f"z_{defect}_{band}"] = z
                quarter = self._worst_quarter(defect, band, values)
                if defect not in worst or z > worst[defect][0]:
                    worst[defect] = (z, band, quarter)
        if not worst:
            return TrendPoint({}, [])
        changes = self._new_changes(step, worst)
        highest = max(z for z, _, _ in worst.values())
        values["z"] = highest
        values["level"] = _level(highest)
        if self._reported:
            values["first_warning"] = float(min(self._reported.values()))
        return TrendPoint(values, changes)

    def _new_changes(self, step: int, worst: Mapping[str, tuple[float, str, int]]) -> list[BandChange]:
        changes = []
        for defect, (z, band, quarter) in worst.items():
            for level, limit in (("alarm", ALARM), ("warning", WARNING)):
                if z >= limit:
                    # An alarm without a warning before it leaves no warning to report afterwards.
                    if f"{defect} {level}" not in self._reported:
                        changes.append(BandChange(defect, level, step, band, quarter, z))
                    self._reported.setdefault(f"{defect} {level}", step)
                    self._reported.setdefault(f"{defect} warning", step)
                    break
        return changes

    def _statistic(self, defect: str, band: str, seen: Mapping[int, tuple[float, float]]) -> float | None:
        """Return the mean of the steps' z over its own deviation, with this step; ``None`` while too little was
        seen.
        """
        added = weight = uncertainty = 0.0
        states = {quarter: self._quarters.setdefault(f"{defect} {band} {quarter}", dict(_EMPTY)) for quarter in seen}
        for quarter, (value, clips) in seen.items():
            state = states[quarter]
            if counts(state):
                z = (value - bound(defect, state["mean"])) * math.sqrt(clips) / deviation(defect, quarter, state)
                z = min(max(z if defect == "inventing" else -z, -STEP_CLIP), STEP_CLIP)
                state["e"] += WEIGHT * (z - state["e"])
                state["k"] += 1
                added += math.sqrt(clips) * z
                weight += clips
                uncertainty += clips * clips / state["clips"]
        statistic = self._weigh(f"{defect} {band}", added, weight, uncertainty)
        if statistic is None or statistic < SUSPECT:
            for quarter, (value, clips) in seen.items():
                if states[quarter]["n"] < REFERENCE_STEPS:
                    learn(defect, quarter, states[quarter], value, clips)
        return statistic

    def _weigh(self, name: str, added: float, weight: float, uncertainty: float) -> float | None:
        """Take a step's z into the weighted mean, where there is one, and return the statistic."""
        if weight == 0.0:
            return _normalised(self._means.get(name))
        mean = self._means.setdefault(name, [0.0, 0.0, 0.0, 0.0])
        # Mean of z, sum of squared weights, the share from the reference's own error, steps.
        mean[0] += WEIGHT * (added / math.sqrt(weight) - mean[0])
        mean[1] = (1 - WEIGHT) ** 2 * mean[1] + WEIGHT**2
        mean[2] += WEIGHT * (math.sqrt(uncertainty / weight) - mean[2])
        mean[3] += 1
        return _normalised(mean)

    def _worst_quarter(self, defect: str, band: str, values: dict[str, float]) -> int:
        """Return the quarter in which a change is largest; add the quarters' own z of the high band to ``values``."""
        found = {}
        for quarter in range(1, QUARTERS + 1):
            state = self._quarters.get(f"{defect} {band} {quarter}")
            if state is not None and state["k"] > 0:
                spread = WEIGHT / (2 - WEIGHT) * (1 - (1 - WEIGHT) ** (2 * state["k"]))
                found[quarter] = state["e"] / math.sqrt(spread + 1 / max(state["n"], ANCHOR_CLIPS))
                if band == "high":
                    values[f"z_{defect}_high_q{quarter}"] = found[quarter]
        return max(found, key=lambda quarter: found[quarter]) if found else 1


def indicator(defect: str, band: Band) -> float:
    """Return a step's number, bounded, so that no clip outweighs all others.

    ``losing``: difference of the arcsines of the roots of the recovered and the expected share (the scale on which a
    share's deviation does not depend on the share); the other defects: energy beyond what is recovered, over the sum of
    both.
    """
    if defect == "losing":
        return angle(band.recovered) - angle(band.expected)
    total = band.energy + abs(band.recovered)
    return (band.energy - band.recovered) / total if total > 0 else 0.0


def angle(share: float) -> float:
    """Return the arcsine of the root of ``share``, cut to 0..1."""
    return math.asin(math.sqrt(min(max(share, 0.0), 1.0)))


def bound(defect: str, mean: float) -> float:
    """Return the value that a step is compared with. Energy that approaches what is recovered is learning: the bound is
    never beyond 0.
    """
    return {"losing": mean, "softening": min(mean, 0.0), "inventing": max(mean, 0.0)}[defect]


def counts(state: Mapping[str, float]) -> bool:
    """Return whether enough was seen of a quarter, or its mean was known from the start."""
    return bool(state["anchored"]) or state["n"] >= EARLIEST


def deviation(defect: str, quarter: int, state: Mapping[str, float]) -> float:
    """Return the deviation of one clip, moderated by the prior."""
    prior = PRIOR_DEVIATION[defect][quarter - 1]
    return math.sqrt((PRIOR_WEIGHT * prior**2 + state["squares"]) / (PRIOR_WEIGHT + max(state["n"] - 1, 0)))


def learn(defect: str, quarter: int, state: dict[str, float], value: float, clips: float) -> None:
    """Add a value to the reference, cut to CLIP deviations (Welford's recurrence, weighted by the clips)."""
    if counts(state):
        room = CLIP * deviation(defect, quarter, state) / math.sqrt(clips)
        value = min(max(value, state["mean"] - room), state["mean"] + room)
    delta = value - state["mean"]
    state["n"] += 1
    state["clips"] += clips
    state["mean"] += delta * clips / state["clips"]
    state["squares"] += clips * delta * (value - state["mean"])


def _indicators(
    defect: str, band: str, bands: Mapping[tuple[str, int], Band], clips: Mapping[int, float]
) -> dict[int, tuple[float, float]]:
    """Return by quarter the indicator of ``band`` and the number of clips."""
    return {
        quarter: (indicator(defect, bands[band, quarter]), clips[quarter])
        for quarter in range(1, QUARTERS + 1)
        if (band, quarter) in bands
    }


def _normalised(mean: list[float] | None) -> float | None:
    return mean[0] / math.sqrt(mean[1] + mean[2] ** 2) if mean is not None else None


def _level(z: float) -> float:
    """Return 3 for an alarm, 2 for a warning, 0 below."""
    if z >= ALARM:
        return 3.0
    return 2.0 if z >= WARNING else 0.0
