"""Test commands on paths that earlier versions identified wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.artifacts.places import PLACES, pipeline
from tests.conftest import Command


@pytest.mark.slow
def test_a_pipeline_with_a_picture_is_sampled(tmp_path: Path, cogflow: Command) -> None:
    """The picture was measured, and the model was not sampled."""
    folder = PLACES["pipeline with a picture"](tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle moves left\n")
    common = ["stage=sample", f"stage.source={folder}", f"run.root={tmp_path}", "run.name=sampled"]
    quick = ["debug=quick", "sampling.steps=1", f"stage.prompts={tmp_path / 'prompts.txt'}"]
    done = cogflow(*common, *quick)
    assert f"stage.source={folder} is taken for a pipeline: model_index.json is there" in done.stdout
    results = json.loads((tmp_path / "sampled" / "sample.json").read_text())["results"]
    assert results["where"] == str(tmp_path / "sampled" / "sampled") and results["sampling"]["steps"] == 1


def test_a_pipeline_is_not_a_checkpoint_because_of_its_name(tmp_path: Path, cogflow: Command) -> None:
    """Its missing manifest and trainer.json were reported."""
    folder = PLACES["pipeline named finetune-step-500"](tmp_path)
    done = cogflow("stage=export", f"stage.source={folder}", "stage.dry_run=true", f"run.root={tmp_path}")
    assert f"stage.source={folder} is taken for a pipeline" in done.stdout and "dry run" in done.stdout


def test_a_pipeline_with_empty_checkpoints_is_not_a_run(tmp_path: Path, cogflow: Command) -> None:
    """The message was: Train first."""
    folder = PLACES["pipeline with empty checkpoints/"](tmp_path)
    done = cogflow("stage=export", f"stage.source={folder}", "stage.dry_run=true", f"run.root={tmp_path}")
    assert f"stage.source={folder} is taken for a pipeline" in done.stdout and "dry run" in done.stdout


def test_an_optimizer_beside_safetensors_is_not_the_model(tmp_path: Path, cogflow: Command) -> None:
    """optimizer.bin was read as weights of an unknown layout."""
    folder = PLACES["optimizer.bin beside model.safetensors"](tmp_path)
    done = cogflow("stage=export", f"stage.source={folder}", f"run.root={tmp_path}", code=2)
    assert "holds model.safetensors without the config.json" in done.stderr and "optimizer.bin" not in done.stderr


def test_the_kind_can_be_given_and_is_checked(tmp_path: Path, cogflow: Command) -> None:
    folder = pipeline(tmp_path / "pipeline")
    common = ["stage=export", f"stage.source={folder}", "stage.dry_run=true", f"run.root={tmp_path}"]
    cogflow(*common, "stage.source_kind=components")
    done = cogflow(*common, "stage.source_kind=run", code=2)
    assert "is not a run: checkpoints/ with a checkpoint in it" in done.stderr
    done = cogflow(*common, "stage.source_kind=folder", code=2)
    assert "stage.source_kind=folder" in done.stderr and "sat_checkpoint" in done.stderr


def test_a_run_cannot_be_resumed_as_a_checkpoint(tmp_path: Path) -> None:
    from cogflow.errors import CheckpointError
    from cogflow.training.checkpoint import open_named

    run = PLACES["run"](tmp_path)
    with pytest.raises(CheckpointError, match="is a run .*not a checkpoint"):
        open_named(str(run))
    with pytest.raises(CheckpointError, match="without optimizer states"):
        open_named(str(run / "checkpoints" / "step-000004"))
    with pytest.raises(CheckpointError, match="does not exist"):
        open_named(str(run / "missing"))
