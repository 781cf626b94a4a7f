"""stage=sample: what it can start from, and its exit code when the source is blurrier than the reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter

from cogflow.data.shapes import draw, scenes
from cogflow.data.video import write_video
from tests.stages.conftest import Command


def clips(folder: Path, sigma: float) -> Path:
    for number, scene in enumerate(scenes(4, 5)):
        frames = gaussian_filter(draw(scene, 9, 128, 192).astype(np.float32), (0, sigma, sigma, 0)) if sigma else draw(scene, 9, 128, 192)
        write_video(folder / f"clip-{number}.mp4", np.clip(frames, 0, 255).astype(np.uint8), 8)
    return folder


def test_blurred_videos_exit_3_and_sharp_ones_0(tmp_path: Path, cogflow: Command) -> None:
    sharp, soft = clips(tmp_path / "sharp", 0), clips(tmp_path / "soft", 1.5)
    common = ["stage=sample", f"run.root={tmp_path}", "run.name=compared"]
    cogflow(*common, f"stage.source={sharp}", f"stage.reference={sharp}")
    done = cogflow(*common, f"stage.source={soft}", f"stage.reference={sharp}", code=3)
    assert "blurrier" in done.stderr
    record = json.loads((tmp_path / "compared/sample.json").read_text())
    assert record["results"]["comparison"]["blurrier"] and len(record["results"]["sharpness"]) == 4
    assert "blurrier than the reference" in (tmp_path / "compared/report.html").read_text()
    # Sharper than the reference is no fault.
    cogflow(*common, f"stage.source={sharp}", f"stage.reference={soft}")


def test_a_pipeline_and_its_run_give_the_validations_latents(flow: Path, cogflow: Command, tmp_path: Path) -> None:
    common = ["stage=sample", "debug=quick", f"run.root={tmp_path}", "run.name=again"]
    wanted = load_file(flow / "samples/step-000004/latents.safetensors")
    for place in (flow / "pipeline", flow):
        cogflow(*common, f"stage.source={place}", f"stage.output={tmp_path / 'out'}")
        ours = load_file(tmp_path / "out/latents.safetensors")
        assert wanted.keys() == ours.keys()
        for name, latents in wanted.items():
            torch.testing.assert_close(ours[name], latents, rtol=1e-3, atol=1e-3)


def test_a_source_that_is_not_there_exits_2(tmp_path: Path, cogflow: Command) -> None:
    done = cogflow("stage=sample", f"stage.source={tmp_path / 'nowhere'}", f"run.root={tmp_path}", code=2)
    assert "does not exist" in done.stderr
