"""The defects of a clip: their meanings, the rules that name a defect by a metric's change, and defects that need no
statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEFECTS: dict[str, str] = {
    "non_finite": "some values are not finite",
    "black": "nothing but black",
    "identical": "frames repeat each other",
    "soft": "fine detail is lost",
    "smeared": "frames are smeared in time",
    "washed_out": "contrast or colour is lost",
    "hazy": "a veil lies over dark tones",
    "over_sharpened": "sharper than the reference",
    "grainy": "more noise than the reference",
    "saturated": "more colour or clipping than the reference",
    "frozen": "less motion than the reference",
    "artefacts": "a grid of blocks, more or less of it than in the reference",
}
"""Defect to its meaning, in the order in which findings are reported."""
FULLY_FINITE = 1.0
BLACK_BRIGHTNESS, BLACK_CONTRAST = 0.03, 0.03  # a clip below both is black
REPEATED_EXCESS = 0.3  # share of frame pairs that repeat, above the reference's share


@dataclass(frozen=True)
class DefectRule:
    """A change of ``metric`` in ``direction`` (-1 down, +1 up, 0 either way) is called ``defect``."""

    defect: str
    metric: str
    direction: int


RULES: tuple[DefectRule, ...] = (
    DefectRule("soft", "blur", -1),
    DefectRule("over_sharpened", "sharp", +1),
    DefectRule("smeared", "smear", -1),
    DefectRule("washed_out", "contrast", -1),
    DefectRule("washed_out", "saturation", -1),
    DefectRule("hazy", "veil", +1),
    DefectRule("grainy", "grain", +1),
    DefectRule("saturated", "saturation", +1),
    DefectRule("saturated", "clipped", +1),
    DefectRule("frozen", "motion", -1),
    DefectRule("artefacts", "artefacts", 0),
)
"""Rules of the quality watch. A metric is a measured one or a derived change
(:data:`cogflow.sharpness.verdict.DERIVED`). A defect may have two rules."""
PAIR_RULES = (DefectRule("soft", "reblur", -1), DefectRule("soft", "detail", -1), *RULES)
"""Rules of :func:`cogflow.sharpness.compare`. The watch omits the first two, which move with content."""


@dataclass(frozen=True)
class RuleMatch:
    """A rule whose metric is beyond its limit: ``level`` warning or alarm, ``z`` signed."""

    rule: DefectRule
    level: str
    z: float


def match_rules(
    z: Mapping[str, float], limits: Mapping[str, tuple[float, float]], rules: tuple[DefectRule, ...] = RULES
) -> list[RuleMatch]:
    """Return the rules whose metric's ``z`` is beyond its ``limits`` (warning, alarm) in the rule's direction, in the
    order of ``rules``.

    Of two rules of one defect the stronger match is returned. Metrics that ``z`` lacks are skipped.
    """
    matches: dict[str, RuleMatch] = {}
    for rule in rules:
        if rule.metric not in z:
            continue
        value, (warning, alarm) = z[rule.metric], limits[rule.metric]
        beyond = abs(value) if rule.direction == 0 else rule.direction * value
        if beyond >= warning and (rule.defect not in matches or beyond > abs(matches[rule.defect].z)):
            matches[rule.defect] = RuleMatch(rule, "alarm" if beyond >= alarm else "warning", value)
    return list(matches.values())


def immediate_defects(candidate: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, str]:
    """Return the defects that one clip shows without statistics: defect to the leading metric.

    A defect that the reference shows, too, is left out, except non-finite values.
    """
    defects = {}
    if not is_finite(candidate):
        defects["non_finite"] = "finite"
    if is_black(candidate) and not is_black(reference):
        defects["black"] = "brightness"
    elif candidate["repeated"] - reference["repeated"] > REPEATED_EXCESS:
        defects["identical"] = "repeated"
    return defects


def is_finite(metrics: Mapping[str, float]) -> bool:
    """Return whether all values of the clip are finite."""
    return metrics.get("finite", FULLY_FINITE) >= FULLY_FINITE


def is_black(metrics: Mapping[str, float]) -> bool:
    """Return whether the clip is finite, dark everywhere and without contrast."""
    dark = metrics["brightness"] < BLACK_BRIGHTNESS and metrics["contrast"] < BLACK_CONTRAST
    return is_finite(metrics) and dark
