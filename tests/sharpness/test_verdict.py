"""compare() names each defect on degraded drawn clips, and finds nothing on equal clips."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from benchmarks import degrade
from cogflow.data.shapes import draw, scenes
from cogflow.sharpness import DEFECTS, METRIC_NOISE, METRICS, Finding, Metrics, compare, measure
from cogflow.sharpness.verdict import DERIVED


@pytest.fixture(scope="module")
def clips() -> dict[str, np.ndarray]:
    return {str(number): draw(scene, 9, 96, 144) for number, scene in enumerate(scenes(8, seed=3))}


@pytest.fixture(scope="module")
def clean(clips: dict[str, np.ndarray]) -> dict[str, Metrics]:
    return {name: measure(clip) for name, clip in clips.items()}


def nan(clip: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(clip))[:, None, None, None] == 1, np.nan, clip / 255).astype(np.float32)


CASES = {
    "soft": degrade.gauss(1.0),
    "smeared": degrade.blend(3),
    "washed_out": degrade.contrast(0.6),
    "hazy": degrade.haze,
    "over_sharpened": degrade.sharpened,
    "grainy": degrade.noise(10),
    "saturated": degrade.saturation(1.8),
    "frozen": degrade.slowed,
    "identical": degrade.frozen,
    "black": lambda clip: clip // 64,
    "artefacts": degrade.blocks,
    "non_finite": nan,
}


def test_every_defect_has_a_case_and_every_change_a_noise_model() -> None:
    assert set(CASES) == set(DEFECTS)
    assert set(METRIC_NOISE) == {*METRICS, *DERIVED}


@pytest.mark.parametrize("defect", CASES)
def test_compare_names_the_defect(defect: str, clips: dict[str, np.ndarray], clean: dict[str, Metrics]) -> None:
    verdict = compare({name: measure(CASES[defect](clip)) for name, clip in clips.items()}, clean)
    alarms = [finding.defect for finding in verdict.findings if finding.level == "alarm"]
    assert defect in alarms and verdict.worse and defect.replace("_", " ") in verdict.line()


def test_equal_clips_have_no_finding(clean: dict[str, Metrics]) -> None:
    verdict = compare(clean, clean)
    assert verdict.findings == [] and not verdict.worse and "nothing wrong (8 clips, pair by pair)" in verdict.line()
    assert all(one.size == one.low == one.high == one.z == 0 for one in verdict.changes.values())


@pytest.mark.parametrize("name", degrade.CONFOUNDS)
def test_confounds_are_not_called_blur(name: str, clips: dict[str, np.ndarray], clean: dict[str, Metrics]) -> None:
    verdict = compare({key: measure(degrade.CONFOUNDS[name](clip)) for key, clip in clips.items()}, clean)
    assert not {"soft", "over_sharpened"} & {finding.defect for finding in verdict.findings}


def test_exchanging_soft_and_sharp_clips_reports_over_sharpening(
    clips: dict[str, np.ndarray], clean: dict[str, Metrics]
) -> None:
    soft = {name: measure(degrade.gauss(1.0)(clip)) for name, clip in clips.items()}
    assert [finding.defect for finding in compare(clean, soft).findings if finding.metric in ("blur", "sharp")] == [
        "over_sharpened"
    ]


def test_clips_with_other_names_are_compared_as_groups(clips: dict[str, np.ndarray], clean: dict[str, Metrics]) -> None:
    others = {f"other {name}": metrics for name, metrics in clean.items()}
    verdict = compare(clean, others)
    assert verdict.findings == [] and verdict.pairing == "8 clips against 8 others, mean against mean"
    very_soft = {name: measure(degrade.gauss(3.0)(clip)) for name, clip in clips.items()}
    unpaired, paired = compare(very_soft, others), compare(very_soft, clean)
    assert "soft" in {finding.defect for finding in unpaired.findings}
    assert abs(unpaired.changes["blur"].z) < abs(paired.changes["blur"].z)


def test_one_pair_can_be_compared_and_several_give_an_interval(
    clean: dict[str, Metrics], clips: dict[str, np.ndarray]
) -> None:
    soft = measure(
        np.stack([gaussian_filter(frame.astype(float), (1.5, 1.5, 0)) for frame in clips["0"]]).astype(np.uint8)
    )
    verdict = compare(soft, clean["0"])
    assert verdict.worse and verdict.pairing == "one pair"
    several = compare({name: measure(degrade.gauss(1.0)(clip)) for name, clip in clips.items()}, clean).changes["blur"]
    assert several.low < several.size < several.high < 0


def test_compare_refuses_empty_input(clean: dict[str, Metrics]) -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        compare({}, clean)


def test_finding_line_gives_level_defect_metric_size_and_step() -> None:
    line = Finding("washed_out", "alarm", "contrast", -0.41, -8.1, since=40).line()
    assert line == "alarm: washed out (contrast or colour is lost): contrast -0.41, z -8.1, since step 40"
