"""The watch: do the samples of a finetune lose quality, seen from validation to validation?

Every prompt is held against its own sample from before the first step (same prompt, same noise), and all prompts together against the
ceiling: what the clips themselves look like after the VAE. Between the two lies learning; what leaves that interval is damage. Per
channel: the prompts' changes, their robust middle, a moderated t statistic of how far that lies outside the interval by more than a
size that matters, for this validation alone and for an exponentially weighted mean over validations. The mean is over *positions*: a
level that stays does not add up to an alarm, as it would in a CUSUM. The limits are from measured nulls (:mod:`watch_nulls`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cogflow.sharpness.defects import at_once, by_rules
from cogflow.sharpness.metrics import METRICS, Metrics
from cogflow.sharpness.robust_statistics import Location, location, normal_score
from cogflow.sharpness.verdict import BLUR_WEIGHTS, Finding, changes_of
from cogflow.sharpness.watch_noise_model import GAIN, MEASURED, WatchNoise
from cogflow.sharpness.wording import sentence

RUNG = 4
LEVELS = ("quiet", "learning", "warning", "alarm")
BLUR = "blur"
IN_BLUR_UNITS = ("blur", "sharp")
LEEWAY = 0.5  # standard errors of the ceiling by which the interval is widened: a compromise, see docs/watch.md
CONTENTS_DF = 3.0  # clips that the deviation over contents counts for, in the ceiling's standard error
SOFT_BY = "wavelet_ratio"  # the channel that tells the size of blur


@dataclass(frozen=True)
class Damage(Finding):
    """A finding of the watch, which can say more: how much, and why most likely."""

    def line(self) -> str:
        """One sentence: level, kind, rung, size, since when, likely causes."""
        return sentence(self.kind, self.level, self.channel, self.size, self.z, self.rung, self.since)


@dataclass(frozen=True)
class WatchVerdict:
    """What a validation shows.

    ``level``: quiet, learning (moved within the interval, or the ceiling is softer than the base), warning or alarm. ``z``: channel to how
    far it lies outside the interval, as a normal score with the sign of the change; 0 inside. ``score``: 0 with nothing wrong, lower is
    worse. ``note``: a line worth reading at the levels quiet and learning; may be empty.
    """

    step: int
    level: str
    findings: list[Finding]
    z: dict[str, float]
    score: float
    note: str = ""
    sizes: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """All findings, or what there is to say without one."""
        return "; ".join(finding.line() for finding in self.findings) or self.note or "nothing wrong"


class QualityWatch:
    """Follows the samples of one run.

    ``baseline``: panels of the samples from before the first step, by name. ``ceiling``: panels of the clips' round trip; held against
    the baseline prompt by prompt where it has the same names, else as a distribution. What it knows is a function of the panels given so
    far, in order: a resumed run gives them again. Raises ``ValueError`` for an empty baseline.
    """

    def __init__(
        self, baseline: Mapping[str, Metrics], ceiling: Mapping[str, Metrics] | None = None, *,
        nulls: WatchNoise = MEASURED,
    ) -> None:  # fmt: skip
        if not baseline:
            raise ValueError("a watch needs samples to start from")
        self.baseline, self.names = {name: dict(panel) for name, panel in baseline.items()}, tuple(baseline)
        self.nulls, self.tested = nulls, tuple(nulls.drifts)
        drifts = nulls.drifts.values()
        self._contents = np.array([drift.contents for drift in drifts])
        self._deviation = np.hypot(nulls.share * self._contents, [drift.variants for drift in drifts])
        self._units = np.array([nulls.unit if name in IN_BLUR_UNITS else 1.0 for name in self.tested])
        self._limits = {
            name: (nulls.warning + drift.stricter, nulls.alarm + drift.stricter) for name, drift in nulls.drifts.items()
        }
        self._matters = np.array([drift.matters for drift in drifts])
        self._references = [self.baseline[name] for name in self.names]
        self._gains = self._gain()
        self._end, self._end_error = self._ceiling(ceiling)
        self._smooth: np.ndarray | None = None
        self._weight = 0.0
        self._since: dict[str, int] = {}

    def update(self, step: int, panels: Mapping[str, Metrics]) -> WatchVerdict:
        """Take in the samples after ``step`` steps. Raises ``ValueError`` when their names are not the baseline's."""
        if set(panels) != set(self.baseline):
            raise ValueError("the samples of a validation have the names of the baseline")
        changes = self._changes([panels[name] for name in self.names], self._references)
        self._weight = (1 - self.nulls.newest) * self._weight + self.nulls.newest
        share = self.nulls.newest / self._weight
        self._smooth = changes if self._smooth is None else (1 - share) * self._smooth + share * changes
        now, smooth = self._beyond(np.stack([changes, self._smooth]))
        stronger = np.where(np.abs(now) >= np.abs(smooth), now, smooth)
        z = dict(zip(self.tested, stronger.tolist(), strict=True))
        findings = self._findings(step, panels, z)
        return self._reading(step, findings, z, changes)

    def _changes(self, panels: Sequence[Metrics], references: Sequence[Metrics]) -> np.ndarray:
        """``[tested channels, panels]``."""
        rows = [changes_of(panel, reference) for panel, reference in zip(panels, references, strict=True)]
        found = np.array([[row[name] for row in rows] for name in self.tested])
        return found / self._units[:, None]

    def _gain(self) -> np.ndarray:
        """``[tested channels, prompts]``: what each prompt has to lose, in units of the median clip of the calibration."""
        at_zero, slope = self.nulls.gain
        own = np.array([blur_value(panel) for panel in self._references]) / self.nulls.unit
        gains = np.ones((len(self.tested), len(self.names)))
        for place, name in enumerate(self.tested):
            if name in IN_BLUR_UNITS:
                gains[place] = np.clip(at_zero + slope * own, *GAIN)
        return gains

    def _ceiling(self, ceiling: Mapping[str, Metrics] | None) -> tuple[np.ndarray, np.ndarray]:
        """Where the ceiling lies above the baseline, per channel, and its standard error."""
        if not ceiling:
            return np.zeros(len(self.tested)), np.zeros(len(self.tested))
        if set(self.names) <= set(ceiling):
            of = self._at(self._changes([ceiling[name] for name in self.names], self._references))
            return of.centre, of.error
        middle = {name: float(np.mean([panel[name] for panel in self._references])) for name in self._references[0]}
        groups = (self._changes(list(group), [middle] * len(group)) for group in (ceiling.values(), self._references))
        over, base = (location(group, self._contents, CONTENTS_DF) for group in groups)
        typical = self._gains.mean(axis=1)
        return (over.centre - base.centre) / typical, np.hypot(over.error, base.error) / typical

    def _beyond(self, changes: np.ndarray) -> np.ndarray:
        """Signed normal score of lying outside the interval from the baseline to the ceiling; changes ``[..., channels, prompts]``."""
        at = self._at(changes)
        low = np.minimum(0.0, self._end - LEEWAY * self._end_error)
        high = np.maximum(0.0, self._end + LEEWAY * self._end_error)
        below = (low - self._matters - at.centre) / at.error
        above = (at.centre - high - self._matters) / at.error
        return normal_score(np.maximum(above, 0) - np.maximum(below, 0), at.df)

    def _at(self, changes: np.ndarray) -> Location:
        """Where the prompts lie. The expected deviation is corrected by how the prompts scatter in all channels together: by the median
        over channels, which damage in some of them does not move, moderated towards 1."""
        rest = changes - self._gains * np.median(changes / self._gains, axis=-1, keepdims=True)
        seen = np.median((rest**2).sum(axis=-1) / self._deviation**2, axis=-1)
        spread = np.sqrt((self.nulls.spread_df + seen) / (self.nulls.spread_df + changes.shape[-1] - 1))
        return location(changes, self._deviation * spread[..., None], self.nulls.prior_df, self._gains)

    def _findings(self, step: int, panels: Mapping[str, Metrics], z: Mapping[str, float]) -> list[Finding]:
        found: list[tuple[str, str, str, float, float]] = []
        seen: dict[str, tuple[str, int]] = {}
        for name in self.names:
            for kind, channel in at_once(panels[name], self.baseline[name]).items():
                seen[kind] = (channel, seen.get(kind, (channel, 0))[1] + 1)
        for kind, (channel, count) in seen.items():
            # One sample with nothing moving in it may be a still picture; no number, or nothing but black, never is.
            level = "warning" if kind == "identical" and count <= len(self.names) / 2 else "alarm"
            found.append((kind, level, channel, self._size(channel, panels), 0.0))
        if "non_finite" not in seen and all(panels[name] == self.baseline[name] for name in self.names):
            found.append(("unchanged", "warning", "finite", 0.0, 0.0))
        for told in by_rules(z, self._limits):
            if told.rule.kind == "frozen" and "identical" in seen:
                continue
            channel = SOFT_BY if told.rule.channel in IN_BLUR_UNITS else told.rule.channel
            found.append((told.rule.kind, told.level, channel, self._size(channel, panels), told.z))
        self._since = {kind: self._since.get(kind, step) for kind, *_ in found}
        findings: list[Finding] = [
            Damage(kind, level, channel, size, score, RUNG, self._since[kind])
            for kind, level, channel, size, score in found
        ]
        return sorted(findings, key=lambda finding: (finding.level != "alarm", -abs(finding.z)))

    def _size(self, channel: str, panels: Mapping[str, Metrics]) -> float:
        """The median change of a channel of the panel."""
        pairs = zip([panels[name] for name in self.names], self._references, strict=True)
        return float(np.median([changes_of(now, then)[channel] for now, then in pairs]))

    def _reading(self, step: int, findings: list[Finding], z: dict[str, float], changes: np.ndarray) -> WatchVerdict:
        worst = max((LEVELS.index(finding.level) for finding in findings), default=0)
        score = -max(
            (abs(finding.z) or (2.0 if finding.level == "warning" else 100.0) for finding in findings), default=0.0
        )
        sizes = dict(zip(self.tested, np.median(changes, axis=1).tolist(), strict=True))
        blur = self.tested.index(BLUR)
        note = ""
        if self._end[blur] < -2 * max(self._end_error[blur], 1e-9) - self._matters[blur]:
            note = "the clips themselves are softer than the base model's samples: moving towards them is learning, not damage"
        moved = self._at(changes)
        towards = normal_score(np.sign(self._end) * moved.centre / moved.error, moved.df) >= self.nulls.warning
        inside = bool((towards & (np.abs(moved.centre) > self._matters)).any())
        level = LEVELS[worst] if worst else ("learning" if inside or note else "quiet")
        return WatchVerdict(step, level, findings, z, score, note, sizes)


def blur_value(panel: Metrics) -> float:
    """The blur composite of one clip, such that a difference is its change."""
    return float(
        sum(
            weight * (math.log(panel[name] + METRICS[name].floor) if METRICS[name].scale == "log" else panel[name])
            for name, weight in BLUR_WEIGHTS.items()
        )
    )
