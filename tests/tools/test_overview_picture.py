"""Test that the overview picture shows a run with samples, and that a run without samples is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogflow.data.shapes import Scene, draw
from cogflow.data.video import write_video
from cogflow.errors import DataError
from cogflow.files.record_io import write_record
from cogflow.records.sample_records import SampleRecord, SamplesRecord, SamplingRecord
from cogflow.tracking.metrics_log import MetricsLog
from tools.overview_picture import draw_overview, main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    clip = draw(Scene("purple", "star", "left", "dark", seed=1), 9, 64, 96)
    log = MetricsLog(folder / "metrics.jsonl")
    sampling = SamplingRecord("default", "CogVideoXDDIMScheduler", "empty caption", 20, 6.0, True, "fp32", False)
    for step in range(5):
        log.log(step, {"train/loss": 1.0 / (step + 1)})
    for step in (0, 4):
        log.log(step, {"sharpness/wavelet_ratio": 0.3 - 0.01 * step, "heldout/loss": 0.5})
        samples = folder / f"samples/step-{step:06d}"
        write_video(samples / "p-seed0.mp4", clip, 8)
        record = SamplesRecord(
            step=step,
            weights_sha256="ab",
            sampling=sampling,
            height=64,
            width=96,
            frames=9,
            fps=8.0,
            max_sequence_length=32,
            dtype="fp32",
            device="cpu",
            samples=[SampleRecord("p-seed0", "p", "a star", 0, "p-seed0.mp4", {"wavelet_ratio": 0.3})],
        )
        write_record(samples / "samples.json", record)
    return folder


def test_the_picture_shows_frames_and_curves(run: Path, tmp_path: Path) -> None:
    picture = np.asarray(Image.open(draw_overview(run, tmp_path / "out" / "run.png")).convert("RGB"))
    assert picture.shape[1] == 1950
    assert (picture == 255).all(axis=-1).mean() < 0.95


def test_a_run_without_samples_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="holds no validation samples"):
        draw_overview(tmp_path, tmp_path / "x.png")
    assert main([str(tmp_path), str(tmp_path / "x.png")]) == 2
    assert "sample_every" in capsys.readouterr().err


def test_missing_arguments_are_refused() -> None:
    assert main([]) == 2
