"""The sequential test on the per-step indicator: does training lose fine detail compared with its own first steps?

Each step gives, per band and quarter of the timesteps, what :mod:`cogflow.sharpness.spectrum` sums over some clips. Three kinds of
change are followed, each in the bands FOLLOWED:

* ``losing``: the recovered share falls below what it was, after taking out what a Wiener filter explains;
* ``softening``: the prediction has less energy than is recovered (a blurred prediction), and less so than at the start;
* ``inventing``: it has more energy than is recovered (grain, artefacts, over-sharpening), and more so than at the start.

A step's value is standardised by its quarter with mean and deviation of the first REFERENCE steps that had a clip there. Where the
held-out clips were looked at before the first step, the mean starts from there, so that damage in the first steps is seen; no step is
learned from while something seems wrong. The deviation is moderated by a prior. The
quarters are added up to one z per step, and an exponentially weighted mean of those over its own deviation, the uncertainty of the
reference included, is the statistic. A level that persists does not accumulate; a drift does show. Moving *up* in the
recovered share is learning and never tells anything; so is a prediction whose energy moves towards what is recovered.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cogflow.sharpness.spectrum import QUARTERS, Band

KINDS = ("losing", "softening", "inventing")
FOLLOWED = ("mid", "high", "fast")
REFERENCE = 20  # steps per quarter
EARLIEST = 6  # values a quarter needs before it counts
WEIGHT = 0.1  # of a new step in the mean
CLIP = 2.5  # deviations beyond which a value of the reference is cut
_ENERGY = (0.05, 0.08, 0.11, 0.22)
PRIOR_DEVIATION = {"losing": (0.12, 0.15, 0.17, 0.2), "softening": _ENERGY, "inventing": _ENERGY}
"""Of one clip, by quarter, about what a frozen tiny model shows (0.09 to 0.26 and 0.03 to 0.25)."""
PRIOR_WEIGHT = 6.0  # values that the prior counts for
ANCHOR_CLIPS = 2.0  # that the held-out clips' mean counts for: their few timesteps are not all of a quarter's (off by up to a deviation)
SUSPECT = 3.5  # a statistic beyond which a step is not learned from
STEP_CLIP = 6.0  # deviations beyond which one step's value in one quarter is cut: one odd clip is no trend
WARNING, ALARM = 4.5, 6.0
_EMPTY: dict[str, float] = {"anchored": 0, "n": 0, "clips": 0.0, "mean": 0.0, "squares": 0.0, "e": 0.0, "k": 0}


@dataclass(frozen=True)
class BandChange:
    """A change seen at ``step``: ``kind`` of KINDS, ``band`` and ``quarter`` (1 least noise) where it is largest, ``z`` (positive)."""

    kind: str
    level: str  # warning | alarm
    step: int
    band: str
    quarter: int
    z: float

    def line(self) -> str:
        """One plain sentence."""
        what = {
            "losing": f"the model recovers less of the {self.band} band than in its first steps",
            "softening": f"the predictions' {self.band} band has less energy than is known: they are getting softer",
            "inventing": f"the predictions' {self.band} band has more energy than is known: detail that is not there",
        }[self.kind]
        return f"{what}, most in quarter {self.quarter} of the noise levels (z {self.z:.1f}, since step {self.step})"


@dataclass(frozen=True)
class TrendPoint:
    """``values``: flat numbers to log; ``moves``: what is new, at most one per kind and level in a run."""

    values: dict[str, float]
    moves: list[BandChange]


class Trend:
    """The test's state, a plain JSON object that :meth:`state` gives and the constructor takes: a resumed run goes on exactly."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        given = copy.deepcopy(dict(state or {}))
        self._quarters: dict[str, dict[str, float]] = given.get("quarters", {})
        self._means: dict[str, list[float]] = given.get("means", {})
        self._told: dict[str, int] = given.get("told", {})

    def state(self) -> dict[str, Any]:
        return copy.deepcopy({"quarters": self._quarters, "means": self._means, "told": self._told})

    def anchor(self, bands: Mapping[tuple[str, int], Band]) -> None:
        """Start the reference from ``bands`` of the held-out clips before the first step. Call it before the first :meth:`update`."""
        for kind in KINDS:
            for band in FOLLOWED:
                for quarter in range(1, QUARTERS + 1):
                    if (band, quarter) in bands:
                        mean = indicator(kind, bands[band, quarter])
                        self._quarters[f"{kind} {band} {quarter}"] = {
                            **_EMPTY,
                            "anchored": 1,
                            "clips": ANCHOR_CLIPS,
                            "mean": mean,
                        }

    def update(self, step: int, bands: Mapping[tuple[str, int], Band], clips: Mapping[int, float]) -> TrendPoint:
        """Take in what one step gave: ``bands`` by name and quarter, ``clips`` the number of clips by quarter."""
        values: dict[str, float] = {}
        worst: dict[str, tuple[float, str, int]] = {}
        for kind in KINDS:
            for band in FOLLOWED:
                seen = {
                    quarter: (indicator(kind, bands[band, quarter]), clips[quarter])
                    for quarter in range(1, QUARTERS + 1)
                    if (band, quarter) in bands
                }
                z = self._statistic(kind, band, seen)
                if z is None:
                    continue
                values[f"z_{kind}_{band}"] = z
                quarter = self._place(kind, band, values)
                if kind not in worst or z > worst[kind][0]:
                    worst[kind] = (z, band, quarter)
        if not worst:
            return TrendPoint({}, [])
        moves = []
        for kind, (z, band, quarter) in worst.items():
            for level, limit in (("alarm", ALARM), ("warning", WARNING)):
                if z >= limit:
                    # An alarm that comes at once leaves no warning to be told afterwards.
                    if f"{kind} {level}" not in self._told:
                        moves.append(BandChange(kind, level, step, band, quarter, z))
                    self._told.setdefault(f"{kind} {level}", step)
                    self._told.setdefault(f"{kind} warning", step)
                    break
        highest = max(z for z, _, _ in worst.values())
        values["z"] = highest
        values["level"] = 3.0 if highest >= ALARM else 2.0 if highest >= WARNING else 0.0
        if self._told:
            values["first_warning"] = float(min(self._told.values()))
        return TrendPoint(values, moves)

    def _statistic(self, kind: str, band: str, seen: Mapping[int, tuple[float, float]]) -> float | None:
        """The mean of the steps' z over its own deviation, this step taken in; ``None`` while too little was seen."""
        added = weight = uncertainty = 0.0
        states = {quarter: self._quarters.setdefault(f"{kind} {band} {quarter}", dict(_EMPTY)) for quarter in seen}
        for quarter, (value, clips) in seen.items():
            state = states[quarter]
            if counts(state):
                z = (value - bound(kind, state["mean"])) * math.sqrt(clips) / deviation(kind, quarter, state)
                z = min(max(z if kind == "inventing" else -z, -STEP_CLIP), STEP_CLIP)
                state["e"] += WEIGHT * (z - state["e"])
                state["k"] += 1
                added += math.sqrt(clips) * z
                weight += clips
                uncertainty += clips * clips / state["clips"]
        statistic = self._weigh(f"{kind} {band}", added, weight, uncertainty)
        if statistic is None or statistic < SUSPECT:
            for quarter, (value, clips) in seen.items():
                if states[quarter]["n"] < REFERENCE:
                    learn(kind, quarter, states[quarter], value, clips)
        return statistic

    def _weigh(self, name: str, added: float, weight: float, uncertainty: float) -> float | None:
        """Take a step's z into the weighted mean, where there is one; the statistic."""
        if weight == 0.0:
            return self._normalised(self._means.get(name))
        mean = self._means.setdefault(name, [0.0, 0.0, 0.0, 0.0])
        # Mean of z, sum of squared weights, the share that the reference's own error gives, steps.
        mean[0] += WEIGHT * (added / math.sqrt(weight) - mean[0])
        mean[1] = (1 - WEIGHT) ** 2 * mean[1] + WEIGHT**2
        mean[2] += WEIGHT * (math.sqrt(uncertainty / weight) - mean[2])
        mean[3] += 1
        return self._normalised(mean)

    @staticmethod
    def _normalised(mean: list[float] | None) -> float | None:
        return mean[0] / math.sqrt(mean[1] + mean[2] ** 2) if mean is not None else None

    def _place(self, kind: str, band: str, values: dict[str, float]) -> int:
        """The quarter in which a change is largest; the quarters' own z of the high band go into ``values``."""
        found = {}
        for quarter in range(1, QUARTERS + 1):
            state = self._quarters.get(f"{kind} {band} {quarter}")
            if state is not None and state["k"] > 0:
                spread = WEIGHT / (2 - WEIGHT) * (1 - (1 - WEIGHT) ** (2 * state["k"]))
                found[quarter] = state["e"] / math.sqrt(spread + 1 / max(state["n"], ANCHOR_CLIPS))
                if band == "high":
                    values[f"z_{kind}_high_q{quarter}"] = found[quarter]
        return max(found, key=lambda quarter: found[quarter]) if found else 1


def indicator(kind: str, band: Band) -> float:
    """A step's number, bounded, so that no clip outweighs all others.

    ``losing``: difference of the arcsines of the roots of the recovered and the expected share (the scale on which a share's deviation
    does not depend on the share); the other kinds: energy beyond what is recovered, over the sum of both.
    """
    if kind == "losing":
        return angle(band.recovered) - angle(band.expected)
    total = band.energy + abs(band.recovered)
    return (band.energy - band.recovered) / total if total > 0 else 0.0


def angle(share: float) -> float:
    return math.asin(math.sqrt(min(max(share, 0.0), 1.0)))


def bound(kind: str, mean: float) -> float:
    """What a step is measured against. Energy that comes closer to what is recovered is learning: the bound is never beyond it."""
    return {"losing": mean, "softening": min(mean, 0.0), "inventing": max(mean, 0.0)}[kind]


def counts(state: Mapping[str, float]) -> bool:
    """Whether enough was seen of a quarter, or its mean was known from the start."""
    return bool(state["anchored"]) or state["n"] >= EARLIEST


def deviation(kind: str, quarter: int, state: Mapping[str, float]) -> float:
    """Of one clip, moderated by the prior."""
    prior = PRIOR_DEVIATION[kind][quarter - 1]
    return math.sqrt((PRIOR_WEIGHT * prior**2 + state["squares"]) / (PRIOR_WEIGHT + max(state["n"] - 1, 0)))


def learn(kind: str, quarter: int, state: dict[str, float], value: float, clips: float) -> None:
    """Add a value to the reference, cut to CLIP deviations (Welford's recurrence, weighted by the clips)."""
    if counts(state):
        room = CLIP * deviation(kind, quarter, state) / math.sqrt(clips)
        value = min(max(value, state["mean"] - room), state["mean"] + room)
    delta = value - state["mean"]
    state["n"] += 1
    state["clips"] += clips
    state["mean"] += delta * clips / state["clips"]
    state["squares"] += clips * delta * (value - state["mean"])
