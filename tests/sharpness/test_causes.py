"""Causes by kind and rung, rules that name kinds, and findings in words."""

from __future__ import annotations

import pytest

from cogflow.sharpness.causes import RUNGS, likely
from cogflow.sharpness.defects import RULES, at_once, by_rules
from cogflow.sharpness.wording import amount, pixels, sentence

KINDS = sorted({rule.kind for rule in RULES} | {"black", "identical", "non_finite", "unchanged"})


@pytest.mark.parametrize("rung", sorted(RUNGS))
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_causes_at_every_rung(kind: str, rung: int) -> None:
    causes = likely(kind, rung)
    assert causes
    assert len(set(causes)) == len(causes)


def test_the_incidents() -> None:
    assert "scaling_factor" in likely("washed_out", 2)[0]
    assert likely("soft", 4)[0] == "learning rate too high"
    assert "snr_shift_scale" in likely("soft", 3)[0]
    assert "config" in likely("soft", 5)[0]
    assert "fp16" in likely("non_finite", 2)[0]


def test_unknown_rung_and_kind() -> None:
    assert likely("soft") == ()
    assert likely("soft", 9) == ()
    assert likely("of no name", 4) == likely("", 4)


def test_a_sentence_says_rung_kind_size_step_and_causes() -> None:
    line = sentence("soft", "alarm", "wavelet_ratio", -0.55, -6.0, 4, 300)
    for words in (
        "alarm: soft",
        "rung 4 (tuned)",
        "like a Gaussian blur of about 1.0 pixels",
        "since step 300",
        "learning rate too high",
    ):
        assert words in line
    assert "\n" not in line
    assert sentence("black", "alarm", "brightness", -0.4, 0.0, None, None) == "alarm: black: the picture is black"


def test_amounts() -> None:
    assert amount("contrast", -0.223) == "contrast -20%"
    assert amount("haze", 0.05) == "haze +0.05"
    assert pixels(-9.0) == "1.5 pixels or more"
    assert pixels(-0.35) == "about 0.8 pixels"


def test_the_stronger_rule_names_a_kind() -> None:
    limits = dict.fromkeys({rule.channel for rule in RULES}, (3.0, 4.0))
    told = by_rules({"contrast": -3.5, "saturation": -5.0, "artefacts": -4.5, "blur": 9.0}, limits)
    assert [(one.rule.kind, one.rule.channel, one.level) for one in told] == [
        ("washed_out", "saturation", "alarm"),
        ("artefacts", "artefacts", "alarm"),
    ]


def test_at_once_tells_what_the_reference_has_not() -> None:
    fine = {"finite": 1.0, "brightness": 0.4, "contrast": 0.2, "repeated": 0.0}
    black = fine | {"brightness": 0.0, "contrast": 0.0, "repeated": 1.0}
    assert at_once(fine, fine) == {}
    assert at_once(black, fine) == {"black": "brightness"}
    assert at_once(black, black) == {}
    assert at_once(fine | {"repeated": 0.8}, fine) == {"identical": "repeated"}
    assert at_once(fine | {"finite": 0.99}, fine | {"finite": 0.99}) == {"non_finite": "finite"}
