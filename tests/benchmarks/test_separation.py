"""Test the separation of blur on real clips that Python packages ship, and the benchmarks of separation and watch on
small folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import separation, watch
from benchmarks.real_clips import Content, find_contents
from benchmarks.separation import Separation, measure_contents, separation_of
from cogflow.data.shapes import draw, scenes
from cogflow.data.video import write_video
from cogflow.errors import DataError

SIZES = {"64x96": (9, 64, 96), "256x384": (5, 256, 384)}
"""Frames, height, width."""
STRIDES = {"64x96": 2, "256x384": 4}
"""Strides through the 29 contents; ``python -m benchmarks.separation`` takes all."""
SOFT_ITSELF = ("cell",)
"""A micrograph out of focus: at 256x384 a sigma of 0.8 lowers its blur value by 0.007, that of others by 0.1."""
CONFOUNDS_AT_MOST = 0.02
AT_LEAST = {
    "gauss 0.8": 0.995,
    "gauss 1": 0.995,
    "down-up 2": 0.99,
    "gauss 1.5 noise 3": 0.99,
    "motion 5": 0.99,
    "motion 5 down": 0.99,
}
"""AUC of the blur value between variants of one content."""


def test_real_clips_are_installed() -> None:
    """Check that the development dependencies provide them: the targets do not hold for drawn clips."""
    names = {content.name for content in find_contents(None)}
    assert {"astronaut", "china", "grace_hopper", "bigbuckbunny-0", "bikes-60"} <= names and len(names) == 29


def separate(contents: list[Content], size: str, stride: int) -> Separation:
    frames, height, width = SIZES[size]
    if height > 128:
        contents = [content for content in contents if content.name not in SOFT_ITSELF]
    return separation_of(measure_contents(contents[::stride], 2, (frames, height, width)))


def test_blur_is_separated_on_three_real_clips() -> None:
    names = ("astronaut", "china", "bikes-60")
    result = separate([content for content in find_contents(None) if content.name in names], "64x96", 1)
    assert result.contents == 3 and result.pairs == 6 and result.monotone == 1
    for name, least in AT_LEAST.items():
        assert result.auc[name]["blur"] >= least, name
        assert result.defects[name]["soft"] == 1
    assert not {"soft", "over_sharpened"} & set(result.defects["clean"])
    assert max(result.blur_verdict_changed.values()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_targets_on_real_clips(size: str) -> None:
    result = separate(find_contents(None), size, STRIDES[size])
    for name, least in AT_LEAST.items():
        assert result.auc[name]["blur"] >= least, name
    for name in ("blend 2", "blend 3"):
        assert result.auc[name]["temporal_sharpness"] >= 0.95 and result.auc[name]["smear"] >= 0.95
    assert result.monotone is not None and result.monotone >= 0.95
    assert max(result.blur_verdict_changed.values()) <= CONFOUNDS_AT_MOST
    # A change that is no blur is seen by its own metric.
    assert result.auc["contrast 0.6"]["contrast"] >= 0.95 and result.auc["contrast 1.6"]["contrast"] <= 0.15
    assert result.auc["noise 5"]["grain"] <= 0.1 and result.auc["noise 10"]["grain"] <= 0.05
    assert result.auc["brighter"]["brightness"] <= 0.15 and result.auc["darker"]["brightness"] >= 0.85
    assert result.defects["frozen"]["identical"] == result.defects["slowed"]["frozen"] == 1


def write_drawn_clips(folder: Path, count: int) -> Path:
    for number, scene in enumerate(scenes(count, seed=3)):
        write_video(folder / f"{number}.mp4", draw(scene, 9, 96, 144), 8)
    return folder


def test_separation_of_clips_in_a_folder(tmp_path: Path) -> None:
    clips = write_drawn_clips(tmp_path / "clips", 2)
    output = tmp_path / "separation.json"
    separation.main(["--clips", str(clips), "--variants", "2", "--frames", "5", "--output", str(output)])
    results = json.loads(output.read_text())
    assert (results["contents"], results["pairs"]) == (2, 4)
    assert results["auc"]["gauss 1.5"]["blur"] == 1 and results["monotone"] == 1
    assert results["defects"]["gauss 1.5"]["soft"] == 1
    assert results["noise"]["contrast"]["rounding"] < results["noise"]["contrast"]["variants"]


def test_a_missing_folder_of_clips_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        separation.main(["--clips", str(tmp_path / "nowhere")])


@pytest.mark.slow
def test_the_watch_on_clips_in_a_folder(tmp_path: Path) -> None:
    clips = write_drawn_clips(tmp_path / "clips", 4)
    output = tmp_path / "watch.json"
    options = ["--variants", "2", "--share", "0.01", "--frames", "5", "--output", str(output)]
    watch.main(["--clips", str(clips), *options])
    results = json.loads(output.read_text())
    still, bounded = results["rows"][0], results["rows"][-1]
    assert (still["drift"], still["alarms"], still["within"]["gauss 1"]) == (0.0, 0, still["damaged"])
    assert bounded["clips"] == 256 and set(results["noise"]["prompt_noise"]) >= {"blur", "clipped"}
