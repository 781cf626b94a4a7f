"""The rules that name a defect, and the defects of one clip."""

from __future__ import annotations

from cogflow.sharpness.defects import DEFECTS, PAIR_RULES, RULES, immediate_defects, match_rules


def test_every_rule_names_a_known_defect() -> None:
    assert {rule.defect for rule in PAIR_RULES} <= set(DEFECTS)


def test_of_two_rules_of_one_defect_the_stronger_matches() -> None:
    limits = dict.fromkeys({rule.metric for rule in RULES}, (3.0, 4.0))
    matches = match_rules({"contrast": -3.5, "saturation": -5.0, "artefacts": -4.5, "blur": 9.0}, limits)
    assert [(match.rule.defect, match.rule.metric, match.level) for match in matches] == [
        ("washed_out", "saturation", "alarm"),
        ("artefacts", "artefacts", "alarm"),
    ]


def test_a_change_between_the_limits_is_a_warning() -> None:
    limits = dict.fromkeys({rule.metric for rule in RULES}, (3.0, 4.0))
    assert [match.level for match in match_rules({"blur": -3.0}, limits)] == ["warning"]
    assert match_rules({"blur": -2.9}, limits) == []


def test_immediate_defects_are_those_that_the_reference_has_not() -> None:
    fine = {"finite": 1.0, "brightness": 0.4, "contrast": 0.2, "repeated": 0.0}
    black = fine | {"brightness": 0.0, "contrast": 0.0, "repeated": 1.0}
    assert immediate_defects(fine, fine) == {}
    assert immediate_defects(black, fine) == {"black": "brightness"}
    assert immediate_defects(black, black) == {}
    assert immediate_defects(fine | {"repeated": 0.8}, fine) == {"identical": "repeated"}
    assert immediate_defects(fine | {"finite": 0.99}, fine | {"finite": 0.99}) == {"non_finite": "finite"}
