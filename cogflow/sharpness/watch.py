"""The watch: do the samples of a finetune lose quality, seen from validation to validation?

Every prompt is held against its own sample from before the first step (same prompt, same noise), and all prompts together against the
ceiling: what the clips themselves look like after the VAE. Between the two lies learning; what leaves that interval is damage. Per
channel: the prompts' changes, their robust middle, a moderated t statistic of how far that lies outside the interval by more than a
size that matters, for this validation alone and for an exponentially weighted mean over validations. The mean is over *positions*: a
level that stays does not add up to an alarm, as it would in a CUSUM. The limits are from measured nulls (:mod:`watch_nulls`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cogflow.sharpness import watch_nulls
from cogflow.sharpness.kinds import at_once, by_rules
from cogflow.sharpness.panel import CHANNELS, Panel
from cogflow.sharpness.statistic import below_zero, location, normal_score
from cogflow.sharpness.verdict import Finding

RUNG = 4
LEVELS = ("quiet", "learning", "warning", "alarm")
TESTED = tuple(watch_nulls.DRIFTS)
SOFT_BY = "wavelet_ratio"  # the channel that tells the size of blur


@dataclass(frozen=True)
class Reading:
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


class Watch:
    """Follows the samples of one run.

    ``baseline``: panels of the samples from before the first step, by name. ``ceiling``: panels of the clips' round trip; held against
    the baseline prompt by prompt where it has the same names, else as a distribution. What it knows is a function of the panels given so
    far, in order: a resumed run gives them again. Raises ``ValueError`` for an empty baseline.
    """

    def __init__(
        self, baseline: Mapping[str, Panel], ceiling: Mapping[str, Panel] | None = None, *,
        warning: float = watch_nulls.WARNING, alarm: float = watch_nulls.ALARM,
    ) -> None:  # fmt: skip
        if not baseline:
            raise ValueError("a watch needs samples to start from")
        self.baseline, self.names = {name: dict(panel) for name, panel in baseline.items()}, tuple(baseline)
        self.limits = (warning, alarm)
        drifts = [watch_nulls.DRIFTS[name] for name in TESTED]
        self._deviation = np.array([drift.deviation for drift in drifts])
        self._matters = np.array([drift.matters for drift in drifts])
        self._contents = np.array([drift.contents for drift in drifts])
        self._base = self._values(self.baseline)
        self._end, self._end_error = self._ceiling(ceiling)
        self._smooth: np.ndarray | None = None
        self._weight = 0.0
        self._since: dict[str, int] = {}

    def update(self, step: int, panels: Mapping[str, Panel]) -> Reading:
        """Take in the samples after ``step`` steps. Raises ``ValueError`` when their names are not the baseline's."""
        if set(panels) != set(self.baseline):
            raise ValueError("the samples of a validation have the names of the baseline")
        changes = self._values(panels) - self._base
        self._weight = (1 - watch_nulls.WEIGHT) * self._weight + watch_nulls.WEIGHT
        share = watch_nulls.WEIGHT / self._weight
        self._smooth = changes if self._smooth is None else (1 - share) * self._smooth + share * changes
        now, smooth = self._beyond(changes), self._beyond(self._smooth)
        stronger = np.where(np.abs(now) >= np.abs(smooth), now, smooth)
        z = dict(zip(TESTED, stronger.tolist(), strict=True))
        findings = self._findings(step, panels, z)
        return self._reading(step, findings, z, changes)

    def _values(self, panels: Mapping[str, Panel]) -> np.ndarray:
        """``[tested channels, panels]``, such that a difference is the change (:func:`cogflow.sharpness.change`)."""
        raw = np.array([[panels[name][channel] for name in self._order(panels)] for channel in CHANNELS])
        for row, channel in zip(raw, CHANNELS.values(), strict=True):
            if channel.scale == "log":
                row[:] = np.log(row + channel.floor)
        by_name = dict(zip(CHANNELS, raw, strict=True))
        by_name["blur"] = sum((weight * by_name[name] for name, weight in watch_nulls.BLUR_WEIGHTS.items()), np.zeros(raw.shape[1]))
        return np.stack([by_name[name] for name in TESTED])

    def _order(self, panels: Mapping[str, Panel]) -> tuple[str, ...]:
        return self.names if set(panels) == set(self.names) else tuple(panels)

    def _ceiling(self, ceiling: Mapping[str, Panel] | None) -> tuple[np.ndarray, np.ndarray]:
        """Where the ceiling lies above the baseline, per channel, and its standard error."""
        if not ceiling:
            return np.zeros(len(TESTED)), np.zeros(len(TESTED))
        shared = [name for name in self.names if name in ceiling]
        if len(shared) == len(self.names):
            of = location(self._values({name: ceiling[name] for name in shared}) - self._base, self._deviation, watch_nulls.PRIOR_DF)
            return of.centre, of.error
        over = location(self._values(ceiling), self._contents, watch_nulls.PRIOR_DF)
        base = location(self._base, self._contents, watch_nulls.PRIOR_DF)
        return over.centre - base.centre, np.hypot(over.error, base.error)

    def _beyond(self, changes: np.ndarray) -> np.ndarray:
        """Signed normal score per channel of lying outside the interval from the baseline to the ceiling."""
        at = location(changes, self._deviation, watch_nulls.PRIOR_DF)
        low, low_error = below_zero(self._end, self._end_error)
        high, high_error = below_zero(-self._end, self._end_error)
        below = (low - self._matters - at.centre) / np.hypot(at.error, low_error)
        above = (at.centre + high - self._matters) / np.hypot(at.error, high_error)
        return normal_score(np.maximum(above, 0) - np.maximum(below, 0), at.df)

    def _findings(self, step: int, panels: Mapping[str, Panel], z: Mapping[str, float]) -> list[Finding]:
        found: list[tuple[str, str, str, float, float]] = []
        seen: dict[str, tuple[str, int]] = {}
        for name in self.names:
            for kind, channel in at_once(panels[name], self.baseline[name]).items():
                seen[kind] = (channel, seen.get(kind, (channel, 0))[1] + 1)
        for kind, (channel, count) in seen.items():
            # One sample with nothing moving in it may be a still picture; no number, or nothing but black, never is.
            level = "warning" if kind == "identical" and count <= len(self.names) / 2 else "alarm"
            found.append((kind, level, channel, self._size(channel, panels), 0.0))
        if all(panels[name] == self.baseline[name] for name in self.names):
            found.append(("unchanged", "warning", "finite", 0.0, 0.0))
        for told in by_rules(z, *self.limits):
            if told.rule.kind == "frozen" and "identical" in seen:
                continue
            channel = SOFT_BY if told.rule.channel == "blur" else told.rule.channel
            found.append((told.rule.kind, told.level, channel, self._size(channel, panels), told.z))
        self._since = {kind: self._since.get(kind, step) for kind, *_ in found}
        findings = [Finding(kind, level, channel, size, score, RUNG, self._since[kind]) for kind, level, channel, size, score in found]
        return sorted(findings, key=lambda finding: (finding.level != "alarm", -abs(finding.z)))

    def _size(self, channel: str, panels: Mapping[str, Panel]) -> float:
        """The median change of a channel of the panel."""
        one = CHANNELS[channel]
        now, then = (np.array([of[name][channel] for name in self.names]) for of in (panels, self.baseline))
        if one.scale == "log":
            now, then = np.log(now + one.floor), np.log(then + one.floor)
        return float(np.median(now - then))

    def _reading(self, step: int, findings: list[Finding], z: dict[str, float], changes: np.ndarray) -> Reading:
        worst = max((LEVELS.index(finding.level) for finding in findings), default=0)
        score = -max((abs(finding.z) or (2.0 if finding.level == "warning" else 100.0) for finding in findings), default=0.0)
        sizes = dict(zip(TESTED, np.median(changes, axis=1).tolist(), strict=True))
        blur = TESTED.index("blur")
        note = ""
        if self._end[blur] < -2 * max(self._end_error[blur], 1e-9) - self._matters[blur]:
            note = "the clips themselves are softer than the base model's samples: moving towards them is learning, not damage"
        moved = location(changes, self._deviation, watch_nulls.PRIOR_DF)
        towards = normal_score(np.sign(self._end) * moved.centre / moved.error, moved.df) >= self.limits[0]
        inside = bool((towards & (np.abs(moved.centre) > self._matters)).any())
        level = LEVELS[worst] if worst else ("learning" if inside or note else "quiet")
        return Reading(step, level, findings, z, score, note, sizes)
