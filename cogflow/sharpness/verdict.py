"""What is wrong with a clip or a set of clips, held against a reference: findings with names, each from the channels that see it.

People call many things blurry. Each has a kind of its own here, every rule looks both ways where there are two ways, and a wrong VAE
scale, which *raises* blur metrics, ends as washed out or full of artefacts instead of as sharp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cogflow.sharpness.kinds import by_rules
from cogflow.sharpness.nulls import NULLS
from cogflow.sharpness.panel import CHANNELS, Panel, change
from cogflow.sharpness.wording import sentence

KINDS: dict[str, str] = {
    "soft": "lost fine detail",
    "washed_out": "lost contrast",
    "hazy": "a veil over dark tones",
    "smeared": "smeared in time",
    "over_sharpened": "sharper than it should be",
    "grainy": "more noise",
    "saturated": "more colour or clipping",
    "frozen": "less motion",
    "identical": "frames repeat each other",
    "black": "nothing but black",
    "artefacts": "patterns no camera makes",
    "non_finite": "values that are no numbers",
    "unchanged": "the same to the bit as before the first step",
}
WARNING, ALARM = 3.0, 4.0
BLUR_WEIGHTS = {"edge_sharpness": 0.2, "reblur": 0.8}
"""Of the channels that decide about blur: ``log s1 - 0.8 log s3`` of the two slopes in :mod:`cogflow.sharpness.edges`, whose deviation
between takes of one content is smallest against what a Gaussian of sigma 0.8 does (1 to 8 or more; the wavelet ratio 1 to 3.3, Crete's 1
to 4.6)."""
BLUR_CHANNELS = tuple(BLUR_WEIGHTS)
BEST_SHARE = 1 / math.sqrt(8)  # of a pair's deviation, that the mean over many pairs still has: drift that they share does not average out


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. ``level`` warning or alarm, ``channel`` the one that leads, ``size`` its change, ``z`` that in null
    deviations."""

    kind: str
    level: str
    channel: str
    size: float
    z: float
    rung: int | None = None
    since: int | None = None

    def line(self) -> str:
        """One plain sentence, with the likely causes where the rung is known."""
        return sentence(self.kind, self.level, self.channel, self.size, self.z, self.rung, self.since)


@dataclass(frozen=True)
class Change:
    """A channel's change: the median over the pairs, its 95 % interval (bootstrap; the value itself for one pair), and z."""

    size: float
    low: float
    high: float
    z: float


@dataclass(frozen=True)
class Verdict:
    """``changes``: of every channel and of ``blur``. ``worse``: some finding is an alarm."""

    findings: list[Finding]
    changes: dict[str, Change]
    pairing: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def worse(self) -> bool:
        return any(finding.level == "alarm" for finding in self.findings)

    def line(self) -> str:
        """All findings, or that there is none."""
        told = "; ".join(finding.line() for finding in self.findings) or "nothing wrong"
        return f"{told} ({self.pairing})"


def blur(changes: Mapping[str, float]) -> float:
    """The blur composite: log slope of edges after light smoothing, less 0.8 of it after heavier smoothing. Below zero is blurrier."""
    return BLUR_WEIGHTS["edge_sharpness"] * changes["edge_sharpness"] + BLUR_WEIGHTS["reblur"] * changes["reblur"]


def changes_of(candidate: Panel, reference: Panel) -> dict[str, float]:
    """Every channel's change, and ``blur``."""
    found = {name: change(name, candidate[name], reference[name]) for name in CHANNELS}
    return found | {"blur": blur(found)}


def compare(candidate: Panel | Mapping[str, Panel], reference: Panel | Mapping[str, Panel], null: str = "variants") -> Verdict:
    """Judge ``candidate`` against ``reference``: two panels of the same content, or panels by name.

    Equal names are compared pair by pair; other names as two groups, mean against mean, with the wider null of other contents.
    ``null`` (rounding or variants) says what a pair may differ in. Raises ``ValueError`` for an empty mapping.
    """
    ours, theirs = _named(candidate), _named(reference)
    if not ours or not theirs:
        raise ValueError("there is nothing to compare")
    if set(ours) == set(theirs):
        rows = [changes_of(ours[name], theirs[name]) for name in ours]
        pairing = f"{len(rows)} clips, pair by pair"
        scale = max(BEST_SHARE, 1 / math.sqrt(len(rows)))
    else:
        rows, null = [changes_of(_mean(ours), _mean(theirs))], "contents"
        pairing = f"{len(ours)} clips against {len(theirs)} others, mean against mean"
        scale = max(BEST_SHARE, math.sqrt((1 / len(ours) + 1 / len(theirs)) / 2))
    changes = {name: _change([row[name] for row in rows], getattr(NULLS[name], null) * scale) for name in rows[0]}
    return Verdict(_findings(changes, _mean(ours)), changes, pairing)


def _named(panels: Any) -> dict[str, Panel]:
    return {"": panels} if isinstance(next(iter(panels.values()), None), float | int) else dict(panels)


def _mean(panels: Mapping[str, Panel]) -> Panel:
    return {name: float(np.mean([panel[name] for panel in panels.values()])) for name in CHANNELS}


def _change(values: list[float], deviation: float) -> Change:
    middle = float(np.median(values))
    picks = np.random.default_rng(0).integers(0, len(values), (200, len(values)))
    low, high = np.quantile(np.median(np.asarray(values)[picks], axis=1), [0.025, 0.975])
    return Change(middle, float(low), float(high), middle / deviation)


def _findings(changes: Mapping[str, Change], panel: Panel) -> list[Finding]:
    """``panel``: the candidate's own, for what needs no reference."""
    found: list[Finding] = []

    def add(kind: str, channel: str, level: str) -> None:
        found.append(Finding(kind, level, channel, changes[channel].size, changes[channel].z))

    z = {name: one.z for name, one in changes.items()}
    if panel["finite"] < 1:
        add("non_finite", "finite", "alarm")
    if panel["brightness"] < 0.03 and panel["contrast"] < 0.03 and z["contrast"] < -WARNING:
        add("black", "brightness", "alarm")
    identical = changes["repeated"].size > 0.3
    if identical:
        add("identical", "repeated", "alarm")
    for told in by_rules(z, WARNING, ALARM):
        if not (identical and told.rule.kind == "frozen"):
            add(told.rule.kind, told.rule.channel, told.level)
    return found
