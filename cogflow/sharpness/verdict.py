"""What is wrong with a clip or a set of clips, held against a reference: findings with names, each from the channels that see it.

People call many things blurry. Each has a kind of its own here, and what can go both ways is looked at both ways: latents at a wrong scale
*raise* most blur metrics while the picture gets worse, and end here as washed out, saturated or full of artefacts instead of as sharp.

    >>> verdict = compare({"a": measure(mine)}, {"a": measure(theirs)})
    >>> verdict.worse, verdict.line()
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cogflow.sharpness.defects import PAIR_RULES, black, by_rules
from cogflow.sharpness.metrics import METRICS, Metrics, change
from cogflow.sharpness.noise_model import METRIC_NOISE

DEFECTS: dict[str, str] = {
    "non_finite": "values that are no numbers",
    "black": "nothing but black",
    "identical": "frames repeat each other",
    "soft": "lost fine detail",
    "smeared": "smeared in time",
    "washed_out": "lost contrast or colour",
    "hazy": "a veil over dark tones",
    "over_sharpened": "sharper than the reference",
    "grainy": "more noise than the reference",
    "saturated": "more colour or clipping than the reference",
    "frozen": "less motion than the reference",
    "artefacts": "a grid of blocks, more or less of it than in the reference",
}
"""Kind to what it means, in the order in which findings are told."""
DERIVED = {
    "blur": "blur composite",
    "sharp": "sharpness beyond what contrast and clipping explain",
    "smear": "smear beyond what blur explains",
    "veil": "dark level beyond what brightness explains",
}
"""Numbers worked out of the channels' changes, with their titles."""
WARNING, ALARM = 3.0, 4.0  # null deviations
BLUR_WEIGHTS = {"edge_sharpness": 0.5, "reblur": 0.5}
"""Of the channels that decide about blur: ``log s1 - 0.5 log s3`` of the two slopes in :mod:`cogflow.sharpness.edges`. Over three frame
sizes a Gaussian of sigma 0.8 moves it by 9 to 12 deviations between takes of one content; the wavelet ratio by 3 to 5, Crete's by 3 to
5."""
BLUR_CHANNELS = tuple(BLUR_WEIGHTS)
SMEAR_PER_BLUR = 6.0  # what a blur in space takes from temporal sharpness, per unit of the composite (4.3 for sigma 0.8, 6 for sigma 4)
SHARP_PER_CLIPPED = (
    0.12  # raised contrast clips, and clipping makes edges steeper: what both together add to the composite
)
VEIL_PER_BRIGHTNESS = 0.5  # a veil is light that was added: it raises the mean, too, but dark tones more
BEST_SHARE = 1 / math.sqrt(
    8
)  # of one pair's deviation, that many pairs still have: what they drift together does not average out
DRAWS = 200  # of the bootstrap


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. ``level`` warning or alarm, ``channel`` the one that leads, ``size`` its change, ``z`` that in null
    deviations (0 for what needs no statistics), ``rung`` and ``since`` (step) where a ladder or a watch knows them."""

    kind: str
    level: str
    channel: str
    size: float
    z: float
    rung: int | None = None
    since: int | None = None

    def line(self) -> str:
        """One plain sentence."""
        title = METRICS[self.channel].title if self.channel in METRICS else DERIVED.get(self.channel, self.channel)
        where = "" if self.rung is None else f" at rung {self.rung}"
        since = "" if self.since is None else f", since step {self.since}"
        meaning = DEFECTS.get(self.kind, self.kind)
        return f"{self.level}: {self.kind.replace('_', ' ')}{where} ({meaning}): {title} {self.size:+.3g}, z {self.z:+.1f}{since}"


@dataclass(frozen=True)
class Change:
    """A channel's change: the median over the pairs (unpaired: mean against mean), its 95 % bootstrap interval, and z."""

    size: float
    low: float
    high: float
    z: float


@dataclass(frozen=True)
class Verdict:
    """``changes``: of every channel and of :data:`DERIVED`."""

    findings: list[Finding]
    changes: dict[str, Change]
    pairing: str

    @property
    def worse(self) -> bool:
        """Whether some finding is an alarm."""
        return any(finding.level == "alarm" for finding in self.findings)

    def line(self) -> str:
        """All findings, or that there is none, and what was compared with what."""
        told = "; ".join(finding.line() for finding in self.findings) or "nothing wrong"
        return f"{told} ({self.pairing})"


def changes_of(candidate: Metrics, reference: Metrics) -> dict[str, float]:
    """Every channel's change, and those of :data:`DERIVED`."""
    return with_derived({name: change(name, candidate[name], reference[name]) for name in METRICS})


def with_derived(found: dict[str, float]) -> dict[str, float]:
    blur = sum(weight * found[name] for name, weight in BLUR_WEIGHTS.items())
    # Sharpening raises temporal sharpness as blur lowers it, but a smear must not hide behind it.
    smear = found["temporal_sharpness"] - SMEAR_PER_BLUR * min(blur, 0.0)
    veil = found["haze"] - VEIL_PER_BRIGHTNESS * max(found["brightness"], 0.0)
    sharp = blur - SHARP_PER_CLIPPED * (max(found["clipped"], 0.0) + max(found["contrast"], 0.0))
    return {**found, "blur": blur, "sharp": sharp, "smear": smear, "veil": veil}


def blur(changes: Mapping[str, float]) -> float:
    """The blur composite of channels' changes. Below zero is blurrier; a Gaussian of sigma 0.8 makes it -0.12 on real clips."""
    return sum(weight * changes[name] for name, weight in BLUR_WEIGHTS.items())


def compare(
    candidate: Metrics | Mapping[str, Metrics], reference: Metrics | Mapping[str, Metrics], null: str = "variants"
) -> Verdict:
    """Judge ``candidate`` against ``reference``: two panels of the same content, or panels by name.

    Equal names are compared pair by pair; other names as two groups, mean against mean, with the wider null of other contents.
    ``null`` says what a pair may differ in with nothing wrong: ``variants`` (another take of the same content) or ``rounding`` (the same
    frames). Raises ``ValueError`` when there is nothing to compare.
    """
    ours, theirs = _named(candidate), _named(reference)
    if not ours or not theirs:
        raise ValueError("there is nothing to compare")
    paired = set(ours) == set(theirs)
    names = sorted(ours) if paired else []
    if paired:
        pairing = f"{len(names)} clips, pair by pair" if names != [""] else "one pair"
        # A median of three or more is a quarter less sure than their mean.
        scale = max(BEST_SHARE, (1.25 if len(names) > 2 else 1.0) / math.sqrt(len(names)))
    else:
        pairing, null = f"{len(ours)} clips against {len(theirs)} others, mean against mean", "contents"
        scale = max(BEST_SHARE, math.sqrt((1 / len(ours) + 1 / len(theirs)) / 2))
    one = [ours[name] for name in names or ours]
    other = [theirs[name] for name in names or theirs]
    sizes = _paired_sizes(one, other) if paired else _group_sizes(one, other)
    changes = {}
    for name, drawn in sizes.items():
        low, high = np.quantile(drawn[1:], [0.025, 0.975])
        changes[name] = Change(
            drawn[0], float(low), float(high), drawn[0] / (getattr(METRIC_NOISE[name], null) * scale)
        )
    return Verdict(_findings(changes, one, other), changes, pairing)


def _named(panels: Any) -> dict[str, Metrics]:
    return {"": panels} if isinstance(next(iter(panels.values()), None), float | int) else dict(panels)


def _paired_sizes(ours: list[Metrics], theirs: list[Metrics]) -> dict[str, list[float]]:
    """By channel the median change, and after it the medians of bootstrap draws."""
    rows = [changes_of(one, other) for one, other in zip(ours, theirs, strict=True)]
    names = list(rows[0])
    table = np.array([[row[name] for name in names] for row in rows])
    picks = np.random.default_rng(0).integers(0, len(rows), (DRAWS, len(rows)))
    drawn = np.concatenate([np.median(table, axis=0)[None], np.median(table[picks], axis=1)])
    return {name: drawn[:, place].tolist() for place, name in enumerate(names)}


def _group_sizes(ours: list[Metrics], theirs: list[Metrics]) -> dict[str, list[float]]:
    """By channel the difference of the groups' means on the channel's scale, and after it those of bootstrap draws."""
    # Changes from any one panel: on a channel's scale they differ from the values by a constant.
    one, other = (
        np.array([[change(name, panel[name], theirs[0][name]) for name in METRICS] for panel in group])
        for group in (ours, theirs)
    )
    random = np.random.default_rng(0)
    rows = [one.mean(axis=0) - other.mean(axis=0)]
    for _ in range(DRAWS):
        picked = (group[random.integers(0, len(group), len(group))].mean(axis=0) for group in (one, other))
        rows.append(next(picked) - next(picked))
    found = [with_derived(dict(zip(METRICS, row.tolist(), strict=True))) for row in rows]
    return {name: [row[name] for row in found] for name in found[0]}


def _findings(changes: Mapping[str, Change], ours: list[Metrics], theirs: list[Metrics]) -> list[Finding]:
    found: list[Finding] = []

    def seen(kind: str, channel: str, share: float) -> None:
        """What needs no statistics: a share of the clips has it, and more than in the reference."""
        found.append(Finding(kind, "alarm", channel, share, 0.0))

    for kind, (channel, wrong) in PLAIN.items():
        mine, before = (float(np.mean([wrong(panel) for panel in group])) for group in (ours, theirs))
        if mine > before:
            seen(kind, channel, mine)
    if all(black(panel) or _not_finite(panel) for panel in ours):
        return found  # black is soft, grey and at rest, too
    z = {name: change.z for name, change in changes.items()}
    told = by_rules(z, dict.fromkeys(z, (WARNING, ALARM)), PAIR_RULES)
    if any(finding.kind == "identical" for finding in found):
        told = [one for one in told if one.rule.kind != "frozen"]
    found += [
        Finding(one.rule.kind, one.level, one.rule.channel, changes[one.rule.channel].size, one.z) for one in told
    ]
    order = list(DEFECTS)
    return sorted(found, key=lambda finding: order.index(finding.kind))


def _not_finite(panel: Metrics) -> bool:
    return panel["finite"] < 1


def _repeats(panel: Metrics) -> bool:
    """More than half of the frames are the one before. Footage at half its rate has just half."""
    return panel["repeated"] > 0.6


PLAIN = {"non_finite": ("finite", _not_finite), "black": ("brightness", black), "identical": ("repeated", _repeats)}
"""Kinds that one clip has or has not, with the channel that shows it."""
