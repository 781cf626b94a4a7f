"""Test what stage=train and stage=prepare do when clips and captions were edited after they were prepared."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from cogflow.config.command import override
from cogflow.config.data_section import DataConfig
from cogflow.data.shapes import draw_folder
from tests import small
from tests.conftest import Command

pytestmark = pytest.mark.slow


def commands(text: str) -> list[list[str]]:
    """Return the words of each command that a message gives, without ``python -m cogflow``."""
    return [shlex.split(line)[3:] for line in re.findall(r"^ +(python -m cogflow .*)$", text, re.MULTILINE)]


def edit(clips: Path) -> None:
    """Change the caption of the second clip and the content of the third."""
    rows = [json.loads(line) for line in (clips / "metadata.jsonl").read_text().splitlines()]
    rows[1]["text"] = "another caption"
    (clips / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(clips / rows[0]["file_name"], clips / rows[2]["file_name"])


CHANGES = ("1 caption changed: videos/00001.mp4", "1 clip changed: videos/00002.mp4")


def test_changed_clips_and_captions_are_never_trained_on_in_silence(tmp_path: Path, cogflow: Command) -> None:
    clips = tmp_path / "my clips"
    draw_folder(clips, DataConfig(clips=5))
    root, run = tmp_path / "runs", tmp_path / "runs" / "a run"
    common = [f"run.root={root}", "run.name=a run", "data=folder", f"data.path={clips}", "data.holdout=1"]
    common += [f"model.path={small.pipeline(tmp_path / 'model')}", "debug=quick", "data.clips=5"]
    words = ["stage=train", *common, "stage.sample_every=0", "stage.evaluate_every=0", "stage.save_every=0"]
    cogflow("stage=prepare", *common)
    done = cogflow(*words, "stage.steps=1")
    assert "5 files by size and time of modification" in done.stdout

    for path in clips.rglob("*.mp4"):  # as after a copy
        os.utime(path, ns=(1, 1))
    assert "5 files by content" in cogflow(*words, "stage.steps=2").stdout

    edit(clips)
    done = cogflow(*words, "stage.steps=3", code=2)
    assert all(line in done.stderr for line in CHANGES), done.stderr
    go_on, prepare, fresh = commands(done.stderr)
    assert go_on == [*words, "stage.steps=3", "stage.changed_data=use_prepared"]
    assert prepare[0] == "stage=prepare" and {override("run.name", "a run-2"), override("data.path", clips)} <= set(
        prepare
    )
    start = override("stage.start", run / "checkpoints" / "step-000002")
    assert {override("run.name", "a run-2"), start} <= set(fresh)
    done = cogflow(*go_on)
    assert "training uses the prepared clips (stage.changed_data=use_prepared)" in done.stdout + done.stderr
    assert all(line in done.stdout for line in CHANGES)

    trained_on = json.loads((run / "cache" / "index.json").read_text())
    done = cogflow("stage=prepare", *common)
    assert "updating the prepared clips" in done.stdout and all(line in done.stdout for line in CHANGES)
    assert "this run was trained up to step 3 on the clips before this update" in done.stdout
    assert json.loads((run / "prepare.json").read_text())["results"]["changes"] == list(CHANGES)
    (kept,) = (run / "cache" / "former").iterdir()
    assert json.loads(kept.read_text()) == trained_on

    done = cogflow(*words, "stage.steps=4", code=2)
    assert "not those that the checkpoint of step 3 was trained on" in done.stderr
    assert all(line in done.stderr for line in CHANGES) and trained_on["fingerprint"] not in done.stderr
    go_on, prepare, fresh = commands(done.stderr)
    done = cogflow(*go_on)
    assert "training continues on the clips that step 3 was trained on" in done.stdout
    trainer = json.loads((run / "checkpoints" / "step-000004" / "trainer.json").read_text())
    assert trainer["identity"]["data"] == trained_on["fingerprint"]

    assert override("stage.start", run / "checkpoints" / "step-000003") in fresh
    cogflow(*prepare)
    done = cogflow(*fresh)
    assert "5 files by size and time of modification" in done.stdout and (root / "a run-2" / "train.json").is_file()


def test_settings_of_the_data_without_an_effect_are_reported(flow: Path, cogflow: Command) -> None:
    folder = flow.parent / "no effect"
    folder.mkdir()
    for name in ("cache", "data"):
        shutil.copytree(flow / name, folder / name)
    words = ["stage=train", "debug=quick", f"run.root={flow.parent}", "run.name=no effect", "stage.sample_every=0"]
    done = cogflow(*words, "stage.steps=1", "data.holdout=3", "data.clips=20", "stage.batch_size=11")
    assert "data.holdout=3 has no effect on training: 2 clips were held out" in done.stdout
    assert "drawn with other settings: data.clips=20, drawn with 12" in done.stdout
    assert "there are 10 clips to train on, fewer than stage.batch_size=11" in done.stdout
