"""The quality watch: do the samples of a finetune lose quality from validation to validation?

Every prompt is compared with its own sample from before the first step (same prompt, same noise), and all prompts
together with the reconstruction bound: what the clips themselves look like after the VAE. A change from the baseline
towards the bound is learning; a change outside that interval is damage. Per metric the watch computes the prompts'
changes, their robust centre, and a moderated t statistic of how far the centre is outside the interval by more than a
size that matters: for this validation alone, and for an exponentially weighted mean over validations. The mean is over
levels: a constant level does not add up to an alarm, as it would in a CUSUM. The limits come from
:data:`cogflow.sharpness.noise_model.WATCH_NOISE`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cogflow.sharpness.defects import immediate_defects, match_rules
from cogflow.sharpness.metrics import METRICS, Metrics
from cogflow.sharpness.noise_model import GAIN_BOUNDS, WATCH_NOISE, WatchNoise
from cogflow.sharpness.robust_statistics import Location, location, normal_score
from cogflow.sharpness.verdict import BLUR_WEIGHTS, Finding, metric_changes

LEVELS = ("good", "learning", "warning", "alarm")
UNCHANGED = "unchanged"
"""Defect of samples that equal the baseline to the bit."""
BLUR = "blur"
IN_BLUR_UNITS = ("blur", "sharp")
LEEWAY = 0.5  # standard errors of the bound by which the interval is widened: a compromise, see docs/watch.md
CONTENTS_DF = 3.0  # clips that the deviation over contents counts for, in the bound's standard error
BLUR_SIZE_METRIC = "wavelet_ratio"  # the metric that gives the size of a blur
SOFTER_BOUND = (
    "the clips themselves are softer than the base model's samples: moving towards them is learning, not damage"
)


@dataclass(frozen=True)
class WatchVerdict:
    """The result of one validation.

    ``level``: good, learning (changed within the interval, or the bound is softer than the baseline), warning or alarm.
    ``z``: by metric, how far it is outside the interval, as a normal score with the sign of the change; 0 inside.
    ``score``: 0 with nothing wrong, lower is worse. ``note``: a remark at the levels good and learning; may be empty.
    ``sizes``: median change by tested metric.
    """

    step: int
    level: str
    findings: list[Finding]
    z: dict[str, float]
    score: float
    note: str = ""
    sizes: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """Return all findings, else the note, else that nothing is wrong."""
        return "; ".join(finding.line() for finding in self.findings) or self.note or "nothing wrong"


class QualityWatch:
    """Follow the samples of one run.

    ``baseline``: metrics of the samples from before the first step, by name. ``reconstruction_bound``: metrics of the
    clips' round trip through the VAE; compared with the baseline prompt by prompt where it has the same names, else as
    a distribution. The state is a function of the metrics given so far, in order: a resumed run gives them again. Raise
    ``ValueError`` for an empty baseline.
    """

    def __init__(
        self,
        baseline: Mapping[str, Metrics],
        reconstruction_bound: Mapping[str, Metrics] | None = None,
        *,
        noise: WatchNoise = WATCH_NOISE,
    ) -> None:
        if not baseline:
            raise ValueError("a watch needs samples to start from")
        self.baseline = {name: dict(metrics) for name, metrics in baseline.items()}
        self.names = tuple(baseline)
        self.noise = noise
        self.tested = tuple(noise.prompt_noise)
        prompt_noise = noise.prompt_noise.values()
        self._contents = np.array([one.contents for one in prompt_noise])
        self._deviation = np.hypot(noise.share * self._contents, [one.variants for one in prompt_noise])
        self._units = np.array([noise.unit if name in IN_BLUR_UNITS else 1.0 for name in self.tested])
        self._limits = {
            name: (noise.warning + one.stricter, noise.alarm + one.stricter) for name, one in noise.prompt_noise.items()
        }
        self._least_shift = np.array([one.least_shift for one in prompt_noise])
        self._references = [self.baseline[name] for name in self.names]
        self._gains = self._prompt_gains()
        self._bound, self._bound_error = self._locate_bound(reconstruction_bound)
        self._smooth: np.ndarray | None = None
        self._weight = 0.0
        self._since: dict[str, int] = {}

    def update(self, step: int, samples: Mapping[str, Metrics]) -> WatchVerdict:
        """Judge the samples after ``step`` steps. Raise ``ValueError`` when their names are not the baseline's."""
        if set(samples) != set(self.baseline):
            raise ValueError("the samples of a validation have the names of the baseline")
        changes = self._changes([samples[name] for name in self.names], self._references)
        self._weight = (1 - self.noise.newest) * self._weight + self.noise.newest
        share = self.noise.newest / self._weight
        self._smooth = changes if self._smooth is None else (1 - share) * self._smooth + share * changes
        now, smooth = self._score_outside(np.stack([changes, self._smooth]))
        stronger = np.where(np.abs(now) >= np.abs(smooth), now, smooth)
        z = dict(zip(self.tested, stronger.tolist(), strict=True))
        return self._verdict(step, self._findings(step, samples, z), z, changes)

    def _changes(self, samples: Sequence[Metrics], references: Sequence[Metrics]) -> np.ndarray:
        """Return the changes of all samples, ``[tested metrics, samples]``."""
        rows = [metric_changes(sample, reference) for sample, reference in zip(samples, references, strict=True)]
        table = np.array([[row[name] for row in rows] for name in self.tested])
        return np.asarray(table / self._units[:, None])

    def _prompt_gains(self) -> np.ndarray:
        """Return what each prompt has to lose, in units of the calibration's median clip, ``[tested metrics,
        prompts]``.
        """
        at_zero, slope = self.noise.gain
        own = np.array([blur_composite(metrics) for metrics in self._references]) / self.noise.unit
        gains = np.ones((len(self.tested), len(self.names)))
        for row, name in enumerate(self.tested):
            if name in IN_BLUR_UNITS:
                gains[row] = np.clip(at_zero + slope * own, *GAIN_BOUNDS)
        return gains

    def _locate_bound(self, bound: Mapping[str, Metrics] | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the change from the baseline to the bound by tested metric, and its standard error."""
        if not bound:
            return np.zeros(len(self.tested)), np.zeros(len(self.tested))
        if set(self.names) <= set(bound):
            paired = self._locate(self._changes([bound[name] for name in self.names], self._references))
            return paired.centre, paired.error
        mean = {name: float(np.mean([metrics[name] for metrics in self._references])) for name in self._references[0]}
        groups = [self._changes(list(group), [mean] * len(group)) for group in (bound.values(), self._references)]
        above, base = (location(group, self._contents, CONTENTS_DF) for group in groups)
        typical = self._gains.mean(axis=1)
        return (above.centre - base.centre) / typical, np.hypot(above.error, base.error) / typical

    def _score_outside(self, changes: np.ndarray) -> np.ndarray:
        """Return the signed normal score of being outside the interval from baseline to bound; changes ``[..., metrics,
        prompts]``.
        """
        at = self._locate(changes)
        low = np.minimum(0.0, self._bound - LEEWAY * self._bound_error)
        high = np.maximum(0.0, self._bound + LEEWAY * self._bound_error)
        below = (low - self._least_shift - at.centre) / at.error
        above = (at.centre - high - self._least_shift) / at.error
        return normal_score(np.maximum(above, 0) - np.maximum(below, 0), at.df)

    def _locate(self, changes: np.ndarray) -> Location:
        """Return the centre of the prompts' changes.

        The expected deviation is corrected by the scatter of the prompts in all metrics together: by the median over
        metrics, which damage in some of them does not move, moderated towards 1.
        """
        residual = changes - self._gains * np.median(changes / self._gains, axis=-1, keepdims=True)
        seen = np.median((residual**2).sum(axis=-1) / self._deviation**2, axis=-1)
        spread = np.sqrt((self.noise.spread_df + seen) / (self.noise.spread_df + changes.shape[-1] - 1))
        return location(changes, self._deviation * spread[..., None], self.noise.prior_df, self._gains)

    def _findings(self, step: int, samples: Mapping[str, Metrics], z: Mapping[str, float]) -> list[Finding]:
        immediate = self._immediate_findings(samples)
        defects = {finding.defect for finding in immediate}
        findings = list(immediate)
        for match in match_rules(z, self._limits):
            rule = match.rule
            if rule.defect == "frozen" and "identical" in defects:
                continue
            metric = BLUR_SIZE_METRIC if rule.metric in IN_BLUR_UNITS else rule.metric
            findings.append(Finding(rule.defect, match.level, metric, self._size(metric, samples), match.z))
        self._since = {one.defect: self._since.get(one.defect, step) for one in findings}
        dated = [
            Finding(one.defect, one.level, one.metric, one.size, one.z, since=self._since[one.defect])
            for one in findings
        ]
        return sorted(dated, key=lambda finding: (finding.level != "alarm", -abs(finding.z)))

    def _immediate_findings(self, samples: Mapping[str, Metrics]) -> list[Finding]:
        """Return the defects that need no statistics."""
        leading: dict[str, str] = {}
        counts: dict[str, int] = {}
        for name in self.names:
            for defect, metric in immediate_defects(samples[name], self.baseline[name]).items():
                leading[defect] = metric
                counts[defect] = counts.get(defect, 0) + 1
        findings = []
        for defect, metric in leading.items():
            # One sample without motion may be a still picture; non-finite values or nothing but black never are.
            still_picture = defect == "identical" and counts[defect] <= len(self.names) / 2
            level = "warning" if still_picture else "alarm"
            findings.append(Finding(defect, level, metric, self._size(metric, samples), 0.0))
        if "non_finite" not in leading and all(samples[name] == self.baseline[name] for name in self.names):
            findings.append(Finding(UNCHANGED, "warning", "finite", 0.0, 0.0))
        return findings

    def _size(self, metric: str, samples: Mapping[str, Metrics]) -> float:
        """Return the median change of a measured metric."""
        pairs = zip([samples[name] for name in self.names], self._references, strict=True)
        return float(np.median([metric_changes(now, then)[metric] for now, then in pairs]))

    def _verdict(self, step: int, findings: list[Finding], z: dict[str, float], changes: np.ndarray) -> WatchVerdict:
        worst = max((LEVELS.index(finding.level) for finding in findings), default=0)
        score = -max((_severity(finding) for finding in findings), default=0.0)
        sizes = dict(zip(self.tested, np.median(changes, axis=1).tolist(), strict=True))
        blur = self.tested.index(BLUR)
        softer = self._bound[blur] < -2 * max(self._bound_error[blur], 1e-9) - self._least_shift[blur]
        note = SOFTER_BOUND if softer else ""
        level = LEVELS[worst]
        if not worst and (note or self._is_learning(changes)):
            level = "learning"
        return WatchVerdict(step, level, findings, z, score, note, sizes)

    def _is_learning(self, changes: np.ndarray) -> bool:
        """Return whether some metric clearly moved towards the bound by more than the least shift."""
        at = self._locate(changes)
        towards = normal_score(np.sign(self._bound) * at.centre / at.error, at.df) >= self.noise.warning
        return bool((towards & (np.abs(at.centre) > self._least_shift)).any())


def _severity(finding: Finding) -> float:
    """Return |z|; 2 for a warning and 100 for an alarm that needs no statistics."""
    return abs(finding.z) or (2.0 if finding.level == "warning" else 100.0)


def blur_composite(metrics: Metrics) -> float:
    """Return the blur composite of one clip; the difference of two is its change."""
    return float(
        sum(
            weight * (math.log(metrics[name] + METRICS[name].floor) if METRICS[name].scale == "log" else metrics[name])
            for name, weight in BLUR_WEIGHTS.items()
        )
    )
