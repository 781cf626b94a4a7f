"""Attack a command that continues in a stranger's run: it ends before anything is written, read or unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogflow import cli
from cogflow.artifacts.run_history import begin_line, finish_line, restored_intervals
from cogflow.errors import CheckpointError, CogflowError, DataError
from cogflow.records.history_records import HistoryRecord, RunLine, read_history
from cogflow.records.training_records import LatestCheckpoint
from cogflow.training.checkpoint import check_pickles

PRIVATE = "the private file of the user\n"


def plant(name: str) -> Callable[[Path, Path], None]:
    def link(run: Path, outside: Path) -> None:
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        target = outside / "folder" if "." not in name else outside / "file"
        path.symlink_to(os.path.relpath(target, path.parent))

    return link


def plant_fifo(run: Path, outside: Path) -> None:
    os.mkfifo(run / "events.jsonl")


ATTACKS = {
    "metrics": plant("metrics.jsonl"),
    "log of faults": plant("cogflow.log"),
    "heartbeat": plant("heartbeats/.beat-00000"),
    "stacks": plant("rank-00000.stack"),
    "checkpoints": plant("checkpoints"),
    "step": plant("checkpoints/step-000004"),
    "replaced": plant("replaced"),
    "replaced results": plant("replaced/01/checkpoints"),
    "wandb": plant("wandb"),
    "cache": plant("cache"),
    "fifo": plant_fifo,
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Private files of the user."""
    folder = tmp_path / "outside"
    (folder / "folder" / "step-000009").mkdir(parents=True)
    (folder / "file").write_text(PRIVATE)
    (folder / "folder" / "file").write_text(PRIVATE)
    return folder


def test_a_command_in_a_run_that_leads_out_writes_nothing(
    tmp_path: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, attack in ATTACKS.items():
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        attack(run, outside)
        before = sorted(run.rglob("*"))
        assert cli.main(["stage=train", f"run.root={tmp_path / 'runs'}", f"run.name='{name}'"]) == 2, name
        assert "lead out of it or are no files" in capsys.readouterr().err
        assert sorted(run.rglob("*")) == before
    assert (outside / "file").read_text() == PRIVATE and (outside / "folder" / "step-000009").is_dir()
    assert sorted(path.name for path in outside.rglob("*")) == ["file", "file", "folder", "step-000009"]


@pytest.mark.parametrize("replaced", ["../outside/folder", "/tmp", "../../x", "a/../../outside"])
def test_results_are_moved_to_no_folder_outside_of_the_run(tmp_path: Path, outside: Path, replaced: str) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-000004").mkdir(parents=True)
    line: dict[str, Any] = {
        "number": 1,
        "began": "a",
        "reason": "",
        "command": "",
        "settings": {},
        "replaced": replaced,
        "kept": 1,
    }
    (run / "history.json").write_text(json.dumps({"version": 1, "lines": [{**line, "moved": False}]}))
    with pytest.raises(DataError):
        finish_line(run)
    history = HistoryRecord([RunLine(**line), RunLine(2, "", "", "", {})])
    with pytest.raises(DataError):
        restored_intervals(history, run, f"{replaced}/checkpoints/step-000004", 4)
    assert (run / "checkpoints" / "step-000004").is_dir() and (outside / "folder" / "step-000009").is_dir()


def test_a_history_of_a_stranger_is_checked(tmp_path: Path) -> None:
    for text in ("[" * 100_000, '{"version": 1, "lines": [{"number": ' + "9" * 6000 + "}]}", '{"version": 99}', "{}"):
        (tmp_path / "history.json").write_text(text)
        with pytest.raises(CheckpointError):
            read_history(tmp_path)
        with pytest.raises(CogflowError):
            begin_line(tmp_path, RunLine(1, "", "", "", {}))
    assert LatestCheckpoint.max_bytes <= 1 << 26


class Attack:
    """An object whose unpickling runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_states_that_would_run_code_are_refused_before_they_are_unpickled(tmp_path: Path) -> None:
    folder = tmp_path / "deepspeed" / "states"
    folder.mkdir(parents=True)
    torch.save(
        {"module": {"a": torch.zeros(1)}, "beside": Attack(tmp_path / "ran")}, folder / "mp_rank_00_model_states.pt"
    )
    with pytest.raises(CheckpointError):
        check_pickles(tmp_path / "deepspeed")
    assert not (tmp_path / "ran").exists()
