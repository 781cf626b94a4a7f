"""Test stage=flow end to end: its files agree with each other, and a second run repeats no work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from cogflow.files.publish import check_manifest
from cogflow.weights.tensor_source import weights_fingerprint
from tests.conftest import Command
from tests.permissions import wrong_permissions
from tests.stages.conftest import GROUP_WRITES, lines, losses
from tests.tracking.conftest import Recorded

PLAIN = """
import sys, torch
from diffusers import CogVideoXPipeline
pipe = CogVideoXPipeline.from_pretrained(sys.argv[1])
assert not any(name.split(".")[0] == "cogflow" for name in sys.modules)
video = pipe("a red circle moves left over a light background", num_inference_steps=2, output_type="np").frames
print(video.shape, bool((video == video).all()))
"""


def test_every_stage_leaves_its_record_and_its_result(flow: Path) -> None:
    for stage in ("prepare", "train", "export", "assemble", "diagnose", "flow"):
        assert json.loads((flow / f"{stage}.json").read_text())["status"] == "done"
    for name in (
        "pipeline/model_index.json",
        "pipeline/assembly.json",
        "export/transformer/config.json",
        "report.html",
        "wandb",
    ):
        assert (flow / name).exists(), name
    table = json.loads((flow / "flow.json").read_text())["results"]["table"]
    assert [row[0] for row in table] == ["prepare", "train", "export", "assemble", "diagnose"]
    assert all(check_manifest(path) == [] for path in (flow / "checkpoints").glob("step-*"))


def test_every_file_follows_the_umask(flow: Path) -> None:
    """A colleague can read and change what the user shares: clips, checkpoints, samples, export, pipeline."""
    assert wrong_permissions(flow, GROUP_WRITES) == []
    assert len(list(flow.rglob("*.safetensors"))) > 5


def test_metrics_have_the_names_that_others_rely_on(flow: Path) -> None:
    assert [step for step, _, _ in losses(flow)] == [1, 2, 3, 4]
    last = lines(flow)[-1]
    for name in ("train/lr", "train/step_time", "train/samples_per_second", "train/memory_gb", "time"):
        assert last[name] > 0, name
    assert any(f"train/loss_q{quarter}" in line for line in lines(flow) for quarter in (1, 2, 3, 4))
    assert [line["step"] for line in lines(flow, "heldout/loss")] == [0, 2, 4]
    assert [line["step"] for line in lines(flow, "sharpness/wavelet_ratio")] == [0, 4]


def test_samples_prove_which_weights_made_them(flow: Path) -> None:
    first, last = (json.loads((flow / f"samples/step-00000{step}/samples.json").read_text()) for step in (0, 4))
    weights = load_file(flow / "checkpoints/step-000004/transformer/diffusion_pytorch_model.safetensors")
    assert last["weights_sha256"] == weights_fingerprint(weights.items()) != first["weights_sha256"]
    for record in (first, last):
        for sample in record["samples"]:
            assert (flow / f"samples/step-{record['step']:06d}" / sample["video"]).stat().st_size > 500
    # Raw frames are kept for the newest validation alone.
    assert not (flow / "samples/step-000000/frames.safetensors").exists()
    frames = load_file(flow / "samples/step-000004/frames.safetensors")
    assert {tuple(clip.shape) for clip in frames.values()} == {(9, 64, 96, 3)}


def test_every_artifact_is_made_from_artifacts_that_a_stage_logged(flow: Path) -> None:
    events = [json.loads(line) for line in (flow / "events.jsonl").read_text().splitlines()]
    uses = {event["name"].removeprefix("flow-"): event["uses"] for event in events if event["kind"] == "artifact"}
    assert {name: [used.removeprefix("flow-") for used in names] for name, names in uses.items()} == {
        "base-model": [],
        "clips": ["base-model"],
        "checkpoint": ["clips", "base-model"],
        "export": ["checkpoint"],
        "export-report": ["export"],
        "pipeline": ["export", "base-model"],
        "diagnosis": ["pipeline"],
    }
    sessions = {path.parent.name.rpartition("-")[2]: Recorded(path) for path in flow.glob("wandb/*/run-*.wandb")}
    logged = {(one.name, one.digest): stage for stage, session in sessions.items() for one in session.logged}
    used = {
        stage: {(one.name.removeprefix("flow-"), logged.get((one.name, one.digest))) for one in session.used}
        for stage, session in sessions.items()
    }
    assert used["prepare"] == {("base-model", None)}
    assert used["train"] == {("clips", "prepare"), ("base-model", None)}
    assert used["export"] == {("checkpoint", "train"), ("export", "export")}
    assert used["assemble"] == {("export", "export"), ("base-model", None)}
    assert used["diagnose"] == {("pipeline", "assemble")}


def test_wandb_has_the_systems_metrics_and_not_the_names_of_machine_and_user(flow: Path) -> None:
    paths = list(flow.glob("wandb/*/run-*.wandb"))
    training = next(Recorded(path) for path in paths if path.parent.name.endswith("-train"))
    assert {"memory_percent", "proc.memory.rssMB", "proc.cpu.threads"} <= training.stats
    assert [Recorded(path).host for path in paths] == [""] * len(paths)


def test_training_changes_the_samples_and_the_noise_stays(flow: Path) -> None:
    one, other = (load_file(flow / f"samples/step-00000{step}/latents.safetensors") for step in (0, 4))
    assert one.keys() == other.keys()
    assert all(not torch.equal(one[name], other[name]) for name in one)


def test_the_assembled_pipeline_gives_the_runs_videos(flow: Path) -> None:
    assembly = json.loads((flow / "pipeline/assembly.json").read_text())
    assert assembly["verify"]["status"] == "passed"


def test_the_pipeline_works_without_cogflow(flow: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(flow / "pipeline")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(1, 9, 64, 96, 3) True" in done.stdout


def test_the_same_command_again_trains_nothing(flow: Path, cogflow: Command) -> None:
    before = losses(flow)
    done = cogflow("stage=train", "debug=quick", f"run.root={flow.parent}", "run.name=flow")
    assert "finished" in done.stdout and losses(flow) == before


def test_the_engines_own_folder_exports_the_same_weights(flow: Path, cogflow: Command, tmp_path: Path) -> None:
    """The engine's folder is like that of any trainer on diffusers and DeepSpeed: it does not name the model."""
    words = [
        "stage=export",
        f"stage.source={flow / 'checkpoints/step-000004/deepspeed'}",
        f"run.root={tmp_path}",
        "run.name=foreign",
    ]
    done = cogflow(*words, code=2)
    assert "neither heads nor positions" in done.stderr and not (tmp_path / "foreign").exists()
    cogflow(*words, "model=tiny")
    file = "export/transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "foreign" / file).read_bytes() == (flow / file).read_bytes()


def test_the_ladder_has_every_rung_and_a_healthy_one_has_no_finding(flow: Path) -> None:
    ladder = json.loads((flow / "ladder.json").read_text())
    assert set(ladder["rungs"]) == {"0", "1", "2", "3", "4", "5"} and ladder["findings"] == []
    assert [row["against"] for row in ladder["table"]] == [None, 0, 1, 2, 3, 4]
    assert all(
        row["pairs"] == len(ladder["rungs"][str(row["rung"])]["metrics"])
        for row in ladder["table"]
        if row["rung"] in (2, 4, 5)
    )
    errors = ladder["rungs"]["3"]["schedule"]["errors"]
    assert errors["1"] < 0.8 * errors["3"]
    assert ladder["rungs"]["5"]["failed"] is False and ladder["table"][5]["psnr"] > 50
    assert {"ladder/rung2_blur", "ladder/rung2_psnr", "ladder/rung5_psnr"} <= set().union(
        *map(set, lines(flow, "ladder/rung2_blur"))
    )
    assert (flow / "ladder/clips.png").is_file() and (flow / "ladder/samples.png").is_file()
    assert "The sharpness ladder" in (flow / "report.html").read_text()
