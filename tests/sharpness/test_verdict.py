"""Each member of the blurry family gets its own name, on drawn clips; clips that are as good get none."""

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


def test_every_kind_has_a_case() -> None:
    assert set(CASES) == set(DEFECTS)
    assert set(METRIC_NOISE) == {*METRICS, *DERIVED}


@pytest.mark.parametrize("kind", CASES)
def test_each_kind_is_named(kind: str, clips: dict[str, np.ndarray], clean: dict[str, Metrics]) -> None:
    verdict = compare({name: measure(CASES[kind](clip)) for name, clip in clips.items()}, clean)
    alarms = [finding.kind for finding in verdict.findings if finding.level == "alarm"]
    assert kind in alarms and verdict.worse and kind.replace("_", " ") in verdict.line()


def test_the_same_clips_are_not_worse(clean: dict[str, Metrics]) -> None:
    verdict = compare(clean, clean)
    assert verdict.findings == [] and not verdict.worse and "nothing wrong (8 clips, pair by pair)" in verdict.line()
    assert all(one.size == one.low == one.high == one.z == 0 for one in verdict.changes.values())


@pytest.mark.parametrize("name", degrade.CONFOUNDS)
def test_what_is_no_blur_is_not_called_blur(name: str, clips: dict[str, np.ndarray], clean: dict[str, Metrics]) -> None:
    verdict = compare({key: measure(degrade.CONFOUNDS[name](clip)) for key, clip in clips.items()}, clean)
    assert not {"soft", "over_sharpened"} & {finding.kind for finding in verdict.findings}


def test_sharper_reads_both_ways(clips: dict[str, np.ndarray], clean: dict[str, Metrics]) -> None:
    soft = {name: measure(degrade.gauss(1.0)(clip)) for name, clip in clips.items()}
    assert [finding.kind for finding in compare(clean, soft).findings if finding.channel in ("blur", "sharp")] == [
        "over_sharpened"
    ]


def test_other_names_are_compared_as_groups(clips: dict[str, np.ndarray], clean: dict[str, Metrics]) -> None:
    others = {f"other {name}": panel for name, panel in clean.items()}
    verdict = compare(clean, others)
    assert verdict.findings == [] and verdict.pairing == "8 clips against 8 others, mean against mean"
    very_soft = {name: measure(degrade.gauss(3.0)(clip)) for name, clip in clips.items()}
    unpaired, paired = compare(very_soft, others), compare(very_soft, clean)
    assert "soft" in {finding.kind for finding in unpaired.findings}
    assert abs(unpaired.changes["blur"].z) < abs(paired.changes["blur"].z)


def test_one_pair_and_an_interval(clean: dict[str, Metrics], clips: dict[str, np.ndarray]) -> None:
    soft = measure(
        np.stack([gaussian_filter(frame.astype(float), (1.5, 1.5, 0)) for frame in clips["0"]]).astype(np.uint8)
    )
    verdict = compare(soft, clean["0"])
    assert verdict.worse and verdict.pairing == "one pair"
    several = compare({name: measure(degrade.gauss(1.0)(clip)) for name, clip in clips.items()}, clean).changes["blur"]
    assert several.low < several.size < several.high < 0


def test_nothing_to_compare_is_an_error(clean: dict[str, Metrics]) -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        compare({}, clean)


def test_a_finding_is_a_sentence() -> None:
    line = Finding("washed_out", "alarm", "contrast", -0.41, -8.1, rung=2, since=40).line()
    assert line == "alarm: washed out at rung 2 (lost contrast or colour): contrast -0.41, z -8.1, since step 40"
