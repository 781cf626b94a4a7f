"""Test that the replay of the incident of 2024 is found and repaired by the diagnosis."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

SHORT = (
    "debug=quick",
    "data.clips=12",
    "sampling.steps=3",
    "stage.train.steps=4",
    "stage.train.save_every=4",
    "stage.train.sample_every=4",
    "stage.train.evaluate_every=4",
)


@pytest.mark.slow
def test_the_incident_is_found_and_repaired(repository: Path, tmp_path: Path) -> None:
    """Every load of the wrong pipeline succeeds; the diagnosis names both fields and writes a repaired folder."""
    command = [sys.executable, "-m", "examples.incident", *SHORT, f"run.root={tmp_path}", "tracking.wandb=disabled"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "exit code 3" in done.stdout

    folder = tmp_path / "incident"
    diffusers.CogVideoXPipeline.from_pretrained(folder / "pipeline-2024", local_files_only=True)
    found = json.loads((folder / "diagnosis.json").read_text())
    confidence = {(finding["component"], finding["field"]): finding["confidence"] for finding in found["findings"]}
    assert confidence["vae", "scaling_factor"] > 0.9
    assert confidence["scheduler", "snr_shift_scale"] > 0.9
    assert "the vae's weights" in found["ruled_out"]
    assert found["steps"]["rungs"]["psnr"] < 25
    assert found["repaired"]["verify"]["after"] > 60
    repaired = diffusers.CogVideoXPipeline.from_pretrained(folder / "repaired", local_files_only=True)
    assert repaired.vae.config.scaling_factor == 0.7
    assert repaired.scheduler.config.snr_shift_scale == 1.0
    html = (folder / "diagnosis.html").read_text()
    assert "data:image/png;base64" in html
    assert "scaling_factor" in html
