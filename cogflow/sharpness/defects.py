"""Which channel moving which way is called what, in a verdict over pairs and in the watch over a run; and what a single clip shows without
statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FINITE = 1.0  # below: some value is no number
BLACK_BRIGHTNESS, BLACK_CONTRAST = 0.03, 0.03  # below both: nothing but black
REPEATED_MORE = 0.3  # share of frame pairs that repeat, above the reference's share


@dataclass(frozen=True)
class DefectRule:
    """``channel`` moving to ``side`` (-1 down, +1 up, 0 either way) is called ``kind``."""

    kind: str
    channel: str
    side: int


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
"""Channels of the panel, or numbers worked out of them (:data:`cogflow.sharpness.verdict.DERIVED`). A kind may have two rules."""


PAIR_RULES = (DefectRule("soft", "reblur", -1), DefectRule("soft", "detail", -1), *RULES)
"""Those of :func:`cogflow.sharpness.verdict.compare`. The watch does without the first two, which move with content."""


@dataclass(frozen=True)
class DefectScore:
    """A rule that spoke: ``level`` warning or alarm, ``z`` signed."""

    rule: DefectRule
    level: str
    z: float


def by_rules(
    z: Mapping[str, float], limits: Mapping[str, tuple[float, float]], rules: tuple[DefectRule, ...] = RULES
) -> list[DefectScore]:
    """The rules whose channel's z lies on their side beyond its ``limits`` (warning, alarm), in the order of ``rules``.

    Of two rules of one kind the stronger; ``z`` may lack channels.
    """
    found: dict[str, DefectScore] = {}
    for rule in rules:
        if rule.channel not in z:
            continue
        value, (warning, alarm) = z[rule.channel], limits[rule.channel]
        beyond = abs(value) if rule.side == 0 else rule.side * value
        if beyond >= warning and (rule.kind not in found or beyond > abs(found[rule.kind].z)):
            found[rule.kind] = DefectScore(rule, "alarm" if beyond >= alarm else "warning", value)
    return list(found.values())


def at_once(candidate: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, str]:
    """What one clip shows without statistics: kind to the channel that leads. What the reference has, too, is not told again,
    but for values that are no numbers."""
    found = {}
    if candidate["finite"] < FINITE:
        found["non_finite"] = "finite"
    if black(candidate) and not black(reference):
        found["black"] = "brightness"
    elif candidate["repeated"] - reference["repeated"] > REPEATED_MORE:
        found["identical"] = "repeated"
    return found


def black(panel: Mapping[str, float]) -> bool:
    """Dark all over, and nothing in it. Values that are no numbers have a name of their own."""
    return (
        panel.get("finite", 1.0) >= FINITE
        and panel["brightness"] < BLACK_BRIGHTNESS
        and panel["contrast"] < BLACK_CONTRAST
    )
