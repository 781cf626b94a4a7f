"""Test stage=diagnose on the command line: exit code 0 for a sound pipeline, 3 and a repair for a faulty one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest

from tests.conftest import Command

EQUAL_PSNR = 100.0  # dB


def diagnosis(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "diagnosis.json").read_text())
    return found


def test_the_flows_own_pipeline_agrees(flow: Path) -> None:
    found = diagnosis(flow)
    assert found["agrees"] is True and found["findings"] == []
    assert (
        found["steps"]["evidence"]["scaling_factor"]["best"] == 0.7
        and found["steps"]["evidence"]["snr_shift_scale"]["best"] == 1.0
    )
    assert (flow / "diagnosis.html").is_file()


@pytest.mark.slow
def test_two_wrong_fields_are_named_and_repaired(flow: Path, cogflow: Command, tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(flow / "pipeline", folder)
    for file, fields in (
        ("vae/config.json", {"scaling_factor": 1.15258426}),
        ("scheduler/scheduler_config.json", {"snr_shift_scale": 3.0}),
    ):
        path = folder / file
        config = json.loads(path.read_text()) | fields
        path.write_text(json.dumps(config))
    words = [
        "stage=diagnose",
        f"run.root={tmp_path}",
        "run.name=d",
        "tracking.wandb=disabled",
        f"stage.candidate={folder}",
        "sampling.steps=3",
    ]
    done = cogflow(*words, f"stage.reference={flow}", "stage.fix=true", "stage.prompts=1", code=3)
    found = diagnosis(tmp_path / "d")
    named = {(one["component"], one["field"]) for one in found["findings"]}
    assert named == {("vae", "scaling_factor"), ("scheduler", "snr_shift_scale")} and found["agrees"] is False
    assert all(one["confidence"] > 0.9 and one["rung"] == 5 and one["fix"] for one in found["findings"])
    assert set(found["steps"]["swaps"]["repaired_by"]) == {"vae.scaling_factor", "scheduler.snr_shift_scale"}
    assert "the vae's weights" in found["ruled_out"] and "Repaired" in done.stderr
    verify = found["repaired"]["verify"]
    assert verify["status"] == "repaired"
    assert verify["before"] < 30
    assert verify["after"] == EQUAL_PSNR
    repaired = diffusers.CogVideoXPipeline.from_pretrained(tmp_path / "d" / "repaired", local_files_only=True)
    assert repaired.vae.config.scaling_factor == 0.7 and repaired.scheduler.config.snr_shift_scale == 1.0
    # Without a reference, the training record and the weights themselves show the faults.
    cogflow(*words, "run.name=alone", "stage.full=true", code=3)
    found = diagnosis(tmp_path / "alone")
    assert {(one["component"], one["field"]) for one in found["findings"]} == named
    assert "error of" in " ".join(one["why"] for one in found["findings"])


def test_a_path_that_cannot_be_diagnosed_exits_with_2(cogflow: Command, tmp_path: Path) -> None:
    words = ["stage=diagnose", f"run.root={tmp_path}", "tracking.wandb=disabled"]
    assert "is nothing that cogflow knows" in cogflow(*words, f"stage.candidate={tmp_path}", code=2).stderr
    assert "does not exist" in cogflow(*words, f"stage.candidate={tmp_path / 'nowhere'}", code=2).stderr
