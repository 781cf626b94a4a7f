"""Test the model card, the copied sample videos and the upload to the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from assembling import Work

from cogflow.assemble.components import PipelineComponent
from cogflow.assemble.expectations import ARCHITECTURE
from cogflow.assemble.model_card import _escape_cell, shorten_command
from cogflow.assemble.verification import sampling_settings
from cogflow.errors import PipelineError
from cogflow.files.hashing import hash_file
from cogflow.files.publish import check_manifest, write_manifest
from cogflow.ladder.ladder_record import write_rung
from cogflow.ladder.rung import Rung
from cogflow.models.family import MODEL_SPECS
from cogflow.records.ladder_records import BaseRung, TunedRung
from cogflow.sampling.sample_record import read_sample_record
from cogflow.stages import assemble

RECORD = {
    "version": 1,
    "stage": "train",
    "status": "done",
    "started": "2026-01-01T00:00:00Z",
    "finished": "2026-01-01T01:02:05Z",
    "command": "python -m cogflow stage=train",
    "folder": "runs/a",
    "inputs": {},
    "machine": {"system": "Linux x86_64", "cpus": 2, "processes": 1},
    "settings": {
        "model": {"name": "tiny", "path": None},
        "data": {"frames": 5, "height": 32, "width": 32, "fps": 8.0},
        "stage": {
            "batch_size": 2,
            "gradient_accumulation": 3,
            "learning_rate": 1e-5,
            "schedule": "cosine",
            "text_dropout": 0.1,
            "seed": 7,
        },
    },
    "results": {"summary": "4 steps of 2 clips"},
    "seconds": 3725.0,
    "versions": {"cogflow": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1"},
}


@pytest.fixture
def trained(work: Work) -> Work:
    """The run with a train.json and a ladder; the export names a checkpoint of it."""
    work.edit(
        "run/export/export.json", lambda report: report.update(source=str(work.run / "checkpoints" / "step-000004"))
    )
    write_manifest(work.run / "export")
    (work.run / "train.json").write_text(json.dumps(RECORD))
    record = read_sample_record(work.run / "samples" / "step-000004")
    metrics = record.metrics()
    write_rung(work.run, Rung.BASE, BaseRung(metrics, step=0))
    write_rung(work.run, Rung.TUNED, TunedRung(metrics, step=4, weights="model"))
    return work


@pytest.mark.slow
def test_the_card_has_the_training_the_samples_the_ladder_and_the_command(trained: Work) -> None:
    assemble.run(trained.config(verify=True))
    pipeline = trained.run / "pipeline"
    card = (pipeline / "README.md").read_text()
    for line in (
        "| started from | tiny |",
        "| clips | 5 x 32 x 32 at 8 frames per second |",
        "| micro steps per step | 3 |",
        "| learning rate | 1e-05, cosine |",
        "| time | 1 h 02 min |",
        "| result | 4 steps of 2 clips |",
        "- [a red circle moves left over a light background](samples/circle-seed0.mp4)",
        "![one frame of each sample](samples/contact.png)",
        "| 4 tuned | 4 | 1 | 3 base | 1 |",
        "| 5 exported | 4 | 1 | 4 tuned | 1 |",
        "Assembled by",
    ):
        assert line in card, line
    video = trained.run / "samples" / "step-000004" / "circle-seed0.mp4"
    assert hash_file(pipeline / "samples" / "circle-seed0.mp4") == hash_file(video)
    assert str(trained.folder) not in card and check_manifest(pipeline) == []
    sampling = json.loads((pipeline / "assembly.json").read_text())["sampling"]
    wanted = {
        "steps": 3,
        "guidance_scale": 6.0,
        "use_dynamic_cfg": True,
        "frames": 5,
        "height": 32,
        "width": 32,
        "fps": 8.0,
        "dtype": "fp32",
        "max_sequence_length": 16,
        "from": str(video.parent),
    }
    assert {key: sampling[key] for key in wanted} == wanted


def test_samples_of_other_weights_are_not_copied(trained: Work) -> None:
    trained.edit("run/samples/step-000004/samples.json", lambda record: record.update(weights_sha256="0" * 64))
    assemble.run(trained.config())
    card = (trained.run / "pipeline" / "README.md").read_text()
    assert "## Training" in card and "## Samples" not in card and not (trained.run / "pipeline" / "samples").exists()


@pytest.mark.parametrize("name", [name for name in MODEL_SPECS if name != "tiny"])
def test_without_a_run_the_family_gives_the_sampling_settings(name: str, work: Work) -> None:
    member = MODEL_SPECS[name]
    settings = {key: getattr(member, field) for key, field in ARCHITECTURE.items()} | {
        "max_text_seq_length": member.text_tokens
    }
    how = sampling_settings(
        work.config(), None, PipelineComponent("transformer", Path("t"), "CogVideoXTransformer3DModel", settings)
    )
    assert (how.height, how.width, how.frames) == (member.height, member.width, member.frames)
    assert (how.fps, how.dtype) == (member.fps, member.dtype)
    assert (how.steps, how.max_sequence_length, how.origin) == (50, member.text_tokens, f"the facts of {name}")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("run.root=/home/me/runs stage.vae=/mnt/x/y/vae", "run.root=.../me/runs stage.vae=.../y/vae"),
        (
            "stage.base=~/m/c 'stage.config=[/a/b/c.yaml,/d/e/f.yaml]'",
            "'stage.base=~/m/c' 'stage.config=[.../b/c.yaml,.../e/f.yaml]'",
        ),
        ("stage.transformer=runs/a 'stage.vae=/a/b c/d'", "stage.transformer=runs/a 'stage.vae=.../b c/d'"),
        ("stage.output=pipelines/one", "stage.output=pipelines/one"),
    ],
)
def test_paths_of_the_command_are_cut_to_two_names(command: str, shown: str) -> None:
    assert shorten_command(command) == shown


def test_table_cells_are_escaped() -> None:
    assert _escape_cell("a|b\n[c](d)") == "a\\|b \\[c\\](d)"


class Hub:
    """Replaces the hub: records the calls and copies the uploaded folder."""

    def __init__(self, keep: Path, error: Exception | None = None) -> None:
        self.keep, self.error, self.asked = keep, error, []  # type: ignore[var-annotated]

    def api(self, **about: Any) -> Hub:
        return self

    def create_repo(self, repo_id: str, **how: Any) -> Any:
        self.asked.append(("create_repo", repo_id, how))
        if self.error:
            raise self.error
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, **how: Any) -> Any:
        shutil.copytree(how["folder_path"], self.keep)
        self.asked.append(("upload_folder", how.pop("repo_id"), how))
        return SimpleNamespace(commit_url="https://hub/me/mine/commit/1")


def test_nothing_is_uploaded_by_default(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    assemble.run(work.config())
    assert hub.asked == []


def test_the_finished_folder_is_uploaded_without_local_paths(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    assemble.run(work.config(push_to_hub="me/mine"))
    pipeline = work.run / "pipeline"
    assert hub.asked[0] == ("create_repo", "me/mine", {"private": True, "exist_ok": True, "repo_type": "model"})
    assert hub.asked[1][1] == "me/mine" and hub.asked[1][2]["repo_type"] == "model"
    assert check_manifest(tmp_path / "hub") == [] and check_manifest(pipeline) == []
    shared, own = ((folder / "assembly.json").read_text() for folder in (tmp_path / "hub", pipeline))
    assert str(work.folder) in own and str(work.folder) not in shared and ".../base/vae" in shared
    assert {path.name for path in (tmp_path / "hub").rglob("*")} == {path.name for path in pipeline.rglob("*")}
    record = json.loads((work.run / "assemble.json").read_text())
    assert record["results"]["hub"] == "https://hub/me/mine/commit/1" and not list(work.run.glob(".pipeline*"))


@pytest.mark.parametrize(
    "error", [huggingface_hub.errors.LocalTokenNotFoundError("no token"), ConnectionError("unreachable")]
)
def test_a_refused_upload_leaves_the_folder_published(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    hub = Hub(tmp_path / "hub", error)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    with pytest.raises(PipelineError, match=f"is published, but was not uploaded to me/mine: {error}"):
        assemble.run(work.config(push_to_hub="me/mine", hub_private=False))
    assert hub.asked[0][2]["private"] is False and not (tmp_path / "hub").exists()
    assert check_manifest(work.run / "pipeline") == [] and (work.run / "assemble.json").is_file()


def test_a_folder_that_failed_is_not_uploaded(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    work.edit("base/scheduler/scheduler_config.json", lambda config: config.update(snr_shift_scale=3.0))
    with pytest.raises(PipelineError):
        assemble.run(work.config(push_to_hub="me/mine"))
    assert hub.asked == []


def test_the_hubs_api_has_the_arguments_that_are_used() -> None:
    import inspect

    for name, given in (
        ("create_repo", {"private", "exist_ok", "repo_type"}),
        ("upload_folder", {"repo_id", "folder_path", "repo_type", "commit_message"}),
    ):
        assert given <= inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters.keys()
    assert "library_name" in inspect.signature(huggingface_hub.HfApi.__init__).parameters
