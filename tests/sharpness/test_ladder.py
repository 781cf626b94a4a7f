"""The ladder by itself: panels and facts in, table and findings out."""

from __future__ import annotations

from typing import Any

import pytest

from cogflow.ladder.comparison import changes, of_changes
from cogflow.ladder.rungs import work_out
from cogflow.sharpness.metrics import METRICS

PLAIN = dict.fromkeys(METRICS, 0.5) | {
    "finite": 1.0,
    "repeated": 0.0,
    "clipped": 0.0,
    "artefacts": 0.0,
    "wavelet_ratio": -1.0,
}


def panel(spread: float = 0.0, **changed: float) -> dict[str, float]:
    return (
        PLAIN
        | {"wavelet_ratio": PLAIN["wavelet_ratio"] + spread, "contrast": PLAIN["contrast"] * (1 + spread)}
        | changed
    )


def rung(panels: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return {"panels": panels, "facts": facts}


def prompts(**changed: float) -> dict[str, dict[str, float]]:
    return {f"p{index}": panel(0.01 * index, **changed) for index in range(4)}


def ladder(**rungs: Any) -> dict[str, Any]:
    healthy = {
        "0": rung({"a": panel()}, measured=8, scaled_up={}, groups=None, clips_in_all=8),
        "1": rung({"a": panel()}, clips_in_all=8, upscaled={}, size="96x64"),
        "2": rung(
            {"a": panel(-0.02)},
            clips={"a": panel()},
            psnr={"a": 29.0},
            non_finite=[],
            scales={"1": 30.0, "0.607": 19.0},
            identity={"dtype": "fp32"},
        ),
        "3": rung(prompts(), contradictions=[], schedule={"configured": 1.0, "errors": {"1": 0.13, "3": 0.33}}),
        "4": rung(prompts(), step=75),
        "5": rung(prompts(), psnr={"p0": 95.0}, allowed={"psnr": 50.0}, failed=False),
    }
    return {"rungs": healthy | rungs, "variants": {"2": {"bf16": {"chosen": False, "psnr": 57.0, "finite": 1.0}}}}


def found(**rungs: Any) -> list[tuple[int, str, str, str]]:
    return [(one.rung, one.kind, one.level, one.field) for one in work_out(ladder(**rungs))[1]]


def test_nothing_is_wrong_with_a_healthy_ladder() -> None:
    rows, findings = work_out(ladder())
    assert findings == [] and [row.rung for row in rows] == list(range(6))
    assert [row.against for row in rows] == [None, 0, 1, 2, 3, 4] and [row.paired for row in rows][3] is False
    assert rows[2].psnr == 29.0 and rows[2].pairs == 1 and rows[4].pairs == 4
    assert rows[2].changes["wavelet_ratio"].size == pytest.approx(-0.02)


def test_a_softer_half_is_the_datas_own() -> None:
    groups = {
        "soft": ["a", "b", "c", "d"],
        "gap": 9.0,
        "distance": 4.0,
        "line": "4 of 8 clips are softer than the rest by 9.0 dB",
    }
    assert found(**{"0": rung({}, measured=8, scaled_up={}, groups=groups)}) == [(0, "soft", "alarm", "")]


@pytest.mark.parametrize(
    ("count", "expected"), [(1, []), (3, [(0, "soft", "warning", "")]), (8, [(0, "soft", "alarm", "")])]
)
def test_scaled_up_clips_are_named_with_their_size(count: int, expected: list[Any]) -> None:
    given = ladder(
        **{"0": rung({}, measured=8, scaled_up={str(index): "24x16" for index in range(count)}, groups=None)}
    )
    findings = work_out(given)[1]
    assert [(one.rung, one.kind, one.level, one.field) for one in findings] == expected
    assert all(f"{count} of 8" in one.line and "24x16" in one.line for one in findings)


def test_clips_that_are_soft_on_purpose_are_told_and_no_finding() -> None:
    given = ladder(
        **{"0": rung({}, measured=8, scaled_up={str(index): "24x16" for index in range(8)}, soft_style=True)}
    )
    rows, findings = work_out(given)
    assert findings == [] and rows[0].verdict == "8 of 8 look scaled up (data.soft_style)"


def test_small_sources_and_a_loader_that_softens_are_rung_1() -> None:
    assert found(**{"1": rung({"a": panel()}, clips_in_all=8, upscaled={"48x32": 8}, size="96x64")}) == [
        (1, "soft", "alarm", "")
    ]
    soft = dict.fromkeys(METRICS, 0.0) | {"wavelet_ratio": -0.5, "edge_sharpness": -0.2, "blur_effect": -0.2}
    for changed, expected in ((soft, [(1, "soft", "alarm", "")]), (dict.fromkeys(METRICS, 0.0), [])):
        assert (
            found(**{"1": rung({"a": panel()}, clips_in_all=8, upscaled={}, loader={"a": changed, "b": changed})})
            == expected
        )


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"scales": {"1": 18.8, "1.6465": 30.5}, "psnr": {"a": 19.0}}, (2, "washed_out", "alarm", "vae.scaling_factor")),
        ({"scales": {"1": 16.0, "0.607": 30.5}, "psnr": {"a": 16.0}}, (2, "saturated", "alarm", "vae.scaling_factor")),
        ({"scales": {"1": 12.0, "0.607": 12.5}, "psnr": {"a": 12.0}}, (2, "artefacts", "alarm", "vae")),
        ({"scales": {"1": 23.0}, "psnr": {"a": 23.0}}, (2, "artefacts", "warning", "vae")),
        ({"non_finite": ["a"], "psnr": {"a": 1.0}}, (2, "non_finite", "alarm", "vae.dtype")),
    ],
)  # fmt: skip
def test_what_a_round_trip_tells(facts: dict[str, Any], expected: tuple[int, str, str, str]) -> None:
    whole = {"clips": {"a": panel()}, "identity": {"dtype": "fp16"}} | facts
    given = ladder(**{"2": rung({"a": panel()}, **whole)})
    findings = work_out(given)[1]
    assert [(one.rung, one.kind, one.level, one.field) for one in findings] == [expected]
    assert ("fp16" in findings[0].line) == (expected[1] == "non_finite")


def test_a_chosen_precision_that_hurts_is_found_and_another_is_only_told() -> None:
    for chosen, expected in ((True, [(2, "artefacts", "alarm", "vae.dtype")]), (False, [])):
        given = ladder() | {"variants": {"2": {"fp32, tiled": {"chosen": chosen, "psnr": 24.7, "finite": 1.0}}}}
        assert [(one.rung, one.kind, one.level, one.field) for one in work_out(given)[1]] == expected


def test_contradicting_facts_and_weights_that_know_another_schedule_are_rung_3() -> None:
    wrong = [{"field": "scheduler.snr_shift_scale", "value": 3.0, "expected": 1.0, "family": "cogvideox-5b"}]
    (finding,) = work_out(ladder(**{"3": rung(prompts(), contradictions=wrong)}))[1]
    assert (
        finding.rung == 3
        and finding.field == "scheduler.snr_shift_scale"
        and "3.0" in finding.line
        and "cogvideox-5b has 1.0" in finding.line
    )
    assert found(**{"3": rung(prompts(), schedule={"configured": 3.0, "errors": {"1": 0.13, "3": 0.33}})}) == [
        (3, "soft", "alarm", "scheduler.snr_shift_scale")
    ]


def test_what_the_watch_says_is_rung_4() -> None:
    """The watch knows learning from damage; the ladder repeats it, and does not judge a second time."""
    fallen = prompts(wavelet_ratio=-2.0, edge_sharpness=0.3, blur_effect=0.3)
    said = {"kind": "soft", "level": "alarm", "channel": "wavelet_ratio", "size": -1.0, "line": "alarm: soft"}
    assert found(**{"4": rung(fallen, step=75, watch=[said])}) == [(4, "soft", "alarm", "")]
    assert found(**{"4": rung(fallen, step=75, watch=[])}) == []
    broken = prompts(finite=0.5)
    assert found(**{"4": rung(broken, step=75)}) == [(4, "non_finite", "alarm", "")]  # samples that no watch could see


def test_an_export_that_gives_other_frames_is_rung_5() -> None:
    facts = {"psnr": {"p0": 17.0}, "allowed": {"psnr": 50.0}, "failed": True}
    (finding,) = work_out(ladder(**{"5": rung(prompts(contrast=0.2), **facts)}))[1]
    assert (finding.rung, finding.kind, finding.level) == (5, "washed_out", "alarm") and "17.0 dB" in finding.line


def test_intervals_hold_the_median_and_do_not_depend_on_luck() -> None:
    ours = {str(index): panel(0.01 * index - 0.5) for index in range(9)}
    theirs = {str(index): panel() for index in range(9)}
    one, count = changes(ours, theirs, paired=True)
    assert count == 9 and one == changes(ours, theirs, paired=True)[0]
    assert one["wavelet_ratio"].low < one["wavelet_ratio"].size < one["wavelet_ratio"].high
    assert one["wavelet_ratio"].size == pytest.approx(-0.46)
    groups, _ = changes(ours, {f"other {name}": value for name, value in theirs.items()}, paired=False)
    assert groups["wavelet_ratio"].size == pytest.approx(-0.46)
    assert changes(ours, {"other": panel()}, paired=True) == ({}, 0)
    assert of_changes({"a": {"contrast": 0.1}, "b": {"contrast": 0.3}})["contrast"].size == pytest.approx(0.2)
