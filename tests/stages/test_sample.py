"""Test stage=sample: its sources, and its exit code when the source is blurrier than the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter

from cogflow.artifacts.identify import ArtifactKind
from cogflow.data.shapes import draw, scenes
from cogflow.data.video import write_video
from cogflow.sampling.clip_comparison import compare_clips, measure_clips
from cogflow.sampling.clip_files import read_clips
from cogflow.sampling.sample_record import FRAMES_FILE
from tests.conftest import Command


def clips(folder: Path, sigma: float = 0, *, contrast: float = 1.0, noise: float = 0, height: int = 128) -> Path:
    rng = np.random.default_rng(7)
    for number, scene in enumerate(scenes(4, 5)):
        frames: np.ndarray = draw(scene, 9, height, height * 3 // 2).astype(np.float32)
        frames = gaussian_filter(frames, (0, sigma, sigma, 0)) if sigma else frames
        frames = 128 + contrast * (frames - 128) + noise * rng.standard_normal(frames.shape)
        write_video(folder / f"clip-{number}.mp4", np.clip(frames, 0, 255).round().astype(np.uint8), 8, crf=8)
    return folder


def comparison(root: Path) -> dict[str, Any]:
    return json.loads((root / "compared/sample.json").read_text())["results"]["comparison"]


def sharpness(root: Path) -> dict[str, dict[str, float]]:
    return json.loads((root / "compared/sample.json").read_text())["results"]["sharpness"]


def test_blurred_videos_exit_3_and_sharp_ones_0(tmp_path: Path, cogflow: Command) -> None:
    sharp, soft = clips(tmp_path / "sharp"), clips(tmp_path / "soft", 1.5)
    common = ["stage=sample", f"run.root={tmp_path}", "run.name=compared"]
    cogflow(*common, f"stage.source={sharp}", f"stage.reference={sharp}")
    assert comparison(tmp_path)["findings"] == [] and not comparison(tmp_path)["worse"]
    done = cogflow(*common, f"stage.source={soft}", f"stage.reference={sharp}", code=3)
    assert "blurrier" in done.stderr and "soft" in done.stderr
    found = comparison(tmp_path)
    assert found["worse"] and found["blurrier"] and "soft" in found["defects"] and found["changes"]["blur"]["high"] < 0
    assert "worse than the reference: soft" in (tmp_path / "compared/report.html").read_text()
    assert len(json.loads((tmp_path / "compared/sample.json").read_text())["results"]["sharpness"]) == 4
    # Sharper than the reference is no fault.
    cogflow(*common, f"stage.source={sharp}", f"stage.reference={soft}")


def test_a_worse_video_is_named_by_its_defect(tmp_path: Path, cogflow: Command) -> None:
    sharp = clips(tmp_path / "sharp")
    common = ["stage=sample", f"run.root={tmp_path}", "run.name=compared", f"stage.reference={sharp}"]
    for kind, place in (
        ("washed_out", clips(tmp_path / "pale", contrast=0.5)),
        ("grainy", clips(tmp_path / "grain", noise=12)),
    ):
        done = cogflow(*common, f"stage.source={place}", code=3)
        found = comparison(tmp_path)
        assert found["defects"][0] == kind and not found["blurrier"], found["line"]
        assert kind.replace("_", " ") in done.stderr
    # Only the defects in stage.fail_on set the exit code.
    cogflow(*common, f"stage.source={tmp_path / 'pale'}", "stage.fail_on=[soft]")
    done = cogflow(*common, f"stage.source={tmp_path / 'pale'}", "stage.fail_on=[softt]", code=2)
    assert "Did you mean" in done.stderr or "did you mean" in done.stderr


def test_clips_are_brought_to_one_size_before_they_are_compared(tmp_path: Path) -> None:
    large, small = clips(tmp_path / "large"), clips(tmp_path / "small", height=64)
    reference = measure_clips(large)
    enlarged = measure_clips(small, reference)
    assert enlarged.notes[0] == "clip-0: 96x64 resized to 192x128" and enlarged.common_size == (128, 192)
    assert "soft" in compare_clips(enlarged, reference, ["soft"]).defects
    # The other way round the larger ones lose what the smaller never had.
    assert not compare_clips(measure_clips(large, measure_clips(small)), measure_clips(small), ["soft"]).worse


def test_raw_frames_are_measured_where_they_are_kept(flow: Path, tmp_path: Path, cogflow: Command) -> None:
    ours = measure_clips(flow / "samples/step-000004")
    recorded = {
        one["name"]: one["sharpness"]
        for one in json.loads((flow / "samples/step-000004/samples.json").read_text())["samples"]
    }
    assert ours.raw and ours.metrics.keys() == recorded.keys()
    for name, metrics in ours.metrics.items():
        assert metrics["wavelet_ratio"] == pytest.approx(recorded[name]["wavelet_ratio"], abs=0.02)
    done = cogflow(
        "stage=sample",
        f"stage.source={flow / 'samples/step-000004'}",
        f"stage.reference={flow}",
        f"run.root={tmp_path}",
        "run.name=compared",
    )
    assert "nothing wrong" in done.stdout and "codec" not in done.stdout


def test_the_stated_kind_reads_the_pictures_of_a_folder_with_videos(tmp_path: Path, cogflow: Command) -> None:
    folder = clips(tmp_path / "both")
    rng = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(folder / f"frame-{number}.png")
    common = ["stage=sample", f"run.root={tmp_path}", "run.name=compared", f"stage.source={folder}"]
    cogflow(*common)
    assert sharpness(tmp_path).keys() == {f"clip-{number}" for number in range(4)}
    cogflow(*common, "stage.source_kind=frames", f"stage.reference={folder}", "stage.reference_kind=frames")
    assert sharpness(tmp_path) == measure_clips(folder, kind=ArtifactKind.FRAMES).metrics
    assert sharpness(tmp_path).keys() == {"both"} and comparison(tmp_path)["findings"] == []


def test_stated_frames_are_read_instead_of_raw_frames(tmp_path: Path) -> None:
    save_file({"raw": torch.zeros(2, 32, 32, 3, dtype=torch.uint8)}, tmp_path / FRAMES_FILE)
    Image.new("RGB", (48, 32)).save(tmp_path / "first.png")
    assert [clip.name for clip in read_clips(tmp_path)] == ["raw"]
    (clip,) = read_clips(tmp_path, ArtifactKind.FRAMES)
    assert clip.name == tmp_path.name and clip.frames.shape == (1, 32, 48, 3)


def test_a_pipeline_and_its_run_sample_the_latents_of_the_validation(
    flow: Path, cogflow: Command, tmp_path: Path
) -> None:
    common = ["stage=sample", "debug=quick", f"run.root={tmp_path}", "run.name=again"]
    wanted = load_file(flow / "samples/step-000004/latents.safetensors")
    for place in (flow / "pipeline", flow):
        cogflow(*common, f"stage.source={place}", f"stage.output={tmp_path / 'out'}")
        ours = load_file(tmp_path / "out/latents.safetensors")
        assert wanted.keys() == ours.keys()
        for name, latents in wanted.items():
            torch.testing.assert_close(ours[name], latents, rtol=1e-3, atol=1e-3)


def test_a_missing_source_exits_2(tmp_path: Path, cogflow: Command) -> None:
    done = cogflow("stage=sample", f"stage.source={tmp_path / 'nowhere'}", f"run.root={tmp_path}", code=2)
    assert "does not exist" in done.stderr
