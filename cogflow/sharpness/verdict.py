"""Compare clips with a reference: named defects, each decided by the metrics that see it.

Many different defects are called blurry. Each has a name of its own here, and metrics that can move both ways are
tested both ways: latents at a wrong scale *raise* most blur metrics while the picture gets worse, and are reported as
washed out, saturated or full of artefacts instead of as sharp.

    >>> verdict = compare({"a": measure(mine)}, {"a": measure(theirs)})
    >>> verdict.worse, verdict.line()
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from cogflow.sharpness.defects import DEFECTS, PAIR_RULES, is_black, is_finite, match_rules
from cogflow.sharpness.metrics import METRICS, Metrics, change
from cogflow.sharpness.noise_model import METRIC_NOISE

DERIVED = {
    "blur": "blur composite",
    "sharp": "sharpness beyond what contrast and clipping explain",
    "smear": "smear beyond what blur explains",
    "veil": "dark level beyond what brightness explains",
}
"""Changes derived from the metrics' changes, with their titles."""
WARNING, ALARM = 3.0, 4.0  # deviations of the noise model
BLUR_WEIGHTS = {"edge_sharpness": 0.5, "reblur": 0.5}
"""Weights of the metrics that decide about blur: ``log s1 - 0.5 log s3`` of the two slopes of
:func:`cogflow.sharpness.frame_metrics.edge_log_slopes`. Over three frame sizes a Gaussian of sigma 0.8 moves it by 9 to
12 deviations between takes of one content; the wavelet ratio by 3 to 5, Crete's by 3 to 5."""
BLUR_METRICS = tuple(BLUR_WEIGHTS)
SMEAR_PER_BLUR = (
    6.0  # loss of temporal sharpness by a blur in space, per unit of the composite (4.3 for sigma 0.8, 6 for sigma 4)
)
SHARP_PER_CLIPPED = 0.12  # rise of the composite per rise of contrast and clipping: clipping makes edges steeper
VEIL_PER_BRIGHTNESS = 0.5  # a veil is added light: it raises the mean, too, but dark tones more
LEAST_SCALE = 1 / math.sqrt(
    8
)  # least share of one pair's deviation that a median has: common changes of many pairs do not average out
MOSTLY_REPEATED = 0.6  # share of repeated frames; footage at half its rate has 0.5
BOOTSTRAP_DRAWS = 200


@dataclass(frozen=True)
class Finding:
    """A defect. ``level``: warning or alarm; ``metric``: the leading metric; ``size``: its change; ``z``: that change
    in deviations of the noise model, 0 for defects that need no statistics; ``since``: the step from which a watch has
    reported it."""

    defect: str
    level: str
    metric: str
    size: float
    z: float
    since: int | None = None

    def line(self) -> str:
        """Return one plain sentence."""
        title = METRICS[self.metric].title if self.metric in METRICS else DERIVED.get(self.metric, self.metric)
        since = "" if self.since is None else f", since step {self.since}"
        meaning = DEFECTS.get(self.defect, self.defect)
        change = f"{title} {self.size:+.3g}, z {self.z:+.1f}{since}"
        return f"{self.level}: {self.defect.replace('_', ' ')} ({meaning}): {change}"


@dataclass(frozen=True)
class Change:
    """A metric's change: the median over the pairs (unpaired: mean against mean), its 95 % bootstrap interval,
    and z.
    """

    size: float
    low: float
    high: float
    z: float


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison. ``changes``: by metric, with those of :data:`DERIVED`; ``pairing``: what was
    compared.
    """

    findings: list[Finding]
    changes: dict[str, Change]
    pairing: str

    @property
    def worse(self) -> bool:
        """True if a finding is an alarm."""
        return any(finding.level == "alarm" for finding in self.findings)

    def line(self) -> str:
        """Return all findings, or that there is none, and what was compared."""
        findings = "; ".join(finding.line() for finding in self.findings) or "nothing wrong"
        return f"{findings} ({self.pairing})"


def compare(
    candidate: Metrics | Mapping[str, Metrics], reference: Metrics | Mapping[str, Metrics], noise: str = "variants"
) -> Verdict:
    """Compare ``candidate`` with ``reference``: the metrics of two clips of the same content, or metrics by clip name.

    Equal names are compared pair by pair. Other names are compared as two groups, mean against mean, with the wider
    noise model of other contents. ``noise`` names what a pair may differ in with nothing wrong: ``variants`` (another
    take of the same content) or ``rounding`` (the same frames). Raise ``ValueError`` when there is nothing to compare.
    """
    ours, theirs = _by_name(candidate), _by_name(reference)
    if not ours or not theirs:
        raise ValueError("there is nothing to compare")
    paired = set(ours) == set(theirs)
    names = sorted(ours) if paired else []
    if paired:
        pairing = f"{len(names)} clips, pair by pair" if names != [""] else "one pair"
        # A median of three or more is a quarter less certain than their mean.
        scale = max(LEAST_SCALE, (1.25 if len(names) > 2 else 1.0) / math.sqrt(len(names)))
    else:
        pairing = f"{len(ours)} clips against {len(theirs)} others, mean against mean"
        noise = "contents"
        scale = max(LEAST_SCALE, math.sqrt((1 / len(ours) + 1 / len(theirs)) / 2))
    candidates = [ours[name] for name in names or ours]
    references = [theirs[name] for name in names or theirs]
    sizes = _paired_sizes(candidates, references) if paired else _group_sizes(candidates, references)
    changes = {}
    for name, drawn in sizes.items():
        low, high = np.quantile(drawn[1:], [0.025, 0.975])
        deviation = getattr(METRIC_NOISE[name], noise) * scale
        changes[name] = Change(drawn[0], float(low), float(high), drawn[0] / deviation)
    return Verdict(_findings(changes, candidates, references), changes, pairing)


def metric_changes(candidate: Metrics, reference: Metrics) -> dict[str, float]:
    """Return the change of every metric, and those of :data:`DERIVED`."""
    return add_derived_changes({name: change(name, candidate[name], reference[name]) for name in METRICS})


def add_derived_changes(changes: dict[str, float]) -> dict[str, float]:
    """Return ``changes`` of all metrics with those of :data:`DERIVED`.

    ``blur`` below zero is blurrier; a Gaussian of sigma 0.8 makes it -0.12 on real clips.
    """
    blur = sum(weight * changes[name] for name, weight in BLUR_WEIGHTS.items())
    # Sharpening raises temporal sharpness as blur lowers it, but it must not hide a smear.
    smear = changes["temporal_sharpness"] - SMEAR_PER_BLUR * min(blur, 0.0)
    veil = changes["haze"] - VEIL_PER_BRIGHTNESS * max(changes["brightness"], 0.0)
    sharp = blur - SHARP_PER_CLIPPED * (max(changes["clipped"], 0.0) + max(changes["contrast"], 0.0))
    return {**changes, "blur": blur, "sharp": sharp, "smear": smear, "veil": veil}


def _is_one_clip(metrics: Metrics | Mapping[str, Metrics]) -> TypeGuard[Metrics]:
    return isinstance(next(iter(metrics.values()), None), float | int)


def _by_name(metrics: Metrics | Mapping[str, Metrics]) -> dict[str, Metrics]:
    if _is_one_clip(metrics):
        return {"": metrics}
    return {name: values for name, values in metrics.items() if isinstance(values, Mapping)}


def _paired_sizes(ours: list[Metrics], theirs: list[Metrics]) -> dict[str, list[float]]:
    """Return by metric the median change, followed by the medians of bootstrap draws."""
    rows = [metric_changes(candidate, reference) for candidate, reference in zip(ours, theirs, strict=True)]
    names = list(rows[0])
    table = np.array([[row[name] for name in names] for row in rows])
    picks = np.random.default_rng(0).integers(0, len(rows), (BOOTSTRAP_DRAWS, len(rows)))
    drawn = np.concatenate([np.median(table, axis=0)[None], np.median(table[picks], axis=1)])
    return {name: drawn[:, column].tolist() for column, name in enumerate(names)}


def _group_sizes(ours: list[Metrics], theirs: list[Metrics]) -> dict[str, list[float]]:
    """Return by metric the difference of the groups' means on the metric's scale, followed by those of bootstrap
    draws.
    """
    # Changes from any one clip: on a metric's scale they differ from the values by a constant.
    candidates, references = (
        np.array([[change(name, metrics[name], theirs[0][name]) for name in METRICS] for metrics in group])
        for group in (ours, theirs)
    )
    random = np.random.default_rng(0)
    rows = [candidates.mean(axis=0) - references.mean(axis=0)]
    for _ in range(BOOTSTRAP_DRAWS):
        drawn = [group[random.integers(0, len(group), len(group))].mean(axis=0) for group in (candidates, references)]
        rows.append(drawn[0] - drawn[1])
    changes = [add_derived_changes(dict(zip(METRICS, row.tolist(), strict=True))) for row in rows]
    return {name: [row[name] for row in changes] for name in changes[0]}


def _findings(changes: Mapping[str, Change], ours: list[Metrics], theirs: list[Metrics]) -> list[Finding]:
    findings = _findings_by_share(ours, theirs)
    if all(is_black(metrics) or not is_finite(metrics) for metrics in ours):
        return findings  # black clips are soft, grey and at rest, too
    z = {name: one.z for name, one in changes.items()}
    identical = any(finding.defect == "identical" for finding in findings)
    for match in match_rules(z, dict.fromkeys(z, (WARNING, ALARM)), PAIR_RULES):
        rule = match.rule
        if not (identical and rule.defect == "frozen"):
            findings.append(Finding(rule.defect, match.level, rule.metric, changes[rule.metric].size, match.z))
    order = list(DEFECTS)
    return sorted(findings, key=lambda finding: order.index(finding.defect))


def _findings_by_share(ours: list[Metrics], theirs: list[Metrics]) -> list[Finding]:
    """Return the defects that a larger share of the clips has than of the reference; they need no statistics."""
    findings = []
    for defect, (metric, has_defect) in CLIP_DEFECTS.items():
        share, before = (float(np.mean([has_defect(metrics) for metrics in group])) for group in (ours, theirs))
        if share > before:
            findings.append(Finding(defect, "alarm", metric, share, 0.0))
    return findings


def _has_non_finite(metrics: Metrics) -> bool:
    return not is_finite(metrics)


def _is_mostly_repeated(metrics: Metrics) -> bool:
    return metrics["repeated"] > MOSTLY_REPEATED


CLIP_DEFECTS = {
    "non_finite": ("finite", _has_non_finite),
    "black": ("brightness", is_black),
    "identical": ("repeated", _is_mostly_repeated),
}
"""Defects that one clip has or has not, with the metric that shows each."""
