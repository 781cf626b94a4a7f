"""Test lines of a run's history: nothing is deleted, nothing of another line stays, and an older line can come back."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cogflow.artifacts import run_history
from cogflow.artifacts.run_history import begin_line, finish_line, restored_intervals
from cogflow.artifacts.run_layout import step_folders, step_of
from cogflow.errors import CheckpointError
from cogflow.records.history_records import RollbackEntry, RunLine, current_line, read_history


def save(run: Path, text: str, *steps: int) -> None:
    """Write results of training at ``steps``, with ``text`` in each."""
    for step in steps:
        for kind in ("checkpoints", "samples"):
            folder = run / kind / f"step-{step:06d}"
            folder.mkdir(parents=True)
            (folder / "content").write_text(f"{text} {step}")
    for step in steps:
        add(run / "metrics.jsonl", {"step": step, "time": float(step), "train/loss": 1.0, "line": len(text)})
        add(run / "events.jsonl", {"kind": "alert", "stage": "train", "time": step - 0.5, "title": f"{text} {step}"})


def add(path: Path, line: dict[str, object]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def line(kept: int = -1, checkpoint: str | None = None, step: int | None = None) -> RunLine:
    from_step = step if step is not None else max(kept, 0)
    return RunLine(0, "2026-01-01T00:00:00Z", "a reason", "a command", {}, from_step, checkpoint, kept)


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in step_folders(folder)]


def texts(run: Path, kind: str = "checkpoints") -> list[str]:
    return [(path / "content").read_text() for path in step_folders(run / kind)]


def rows(folder: Path) -> list[int]:
    return [json.loads(text)["step"] for text in (folder / "metrics.jsonl").read_text().splitlines()]


def alerts(folder: Path) -> list[str]:
    return [json.loads(text)["title"] for text in (folder / "events.jsonl").read_text().splitlines()]


def pointer(run: Path) -> int | None:
    path = run / "checkpoints/latest.json"
    return int(json.loads(path.read_text())["step"]) if path.is_file() else None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    begin_line(tmp_path, line())
    save(tmp_path, "first", 0, 10, 20, 30)
    add(tmp_path / "metrics.jsonl", {"step": 40, "time": 1.0, "prepare/clips": 3})
    add(tmp_path / "events.jsonl", {"kind": "table", "stage": "prepare", "time": 99.0, "title": "prepare"})
    (tmp_path / "train.json").write_text("{}")
    return tmp_path


def test_everything_after_the_kept_step_moves_and_nothing_else(run: Path) -> None:
    begun = begin_line(run, line(kept=10))
    assert (begun.number, begun.replaced, begun.moved) == (2, "replaced/01", True)
    assert current_line(run) == 2 and pointer(run) == 10
    aside = run / "replaced/01"
    for kind in ("checkpoints", "samples"):
        assert steps(run / kind) == [0, 10] and steps(aside / kind) == [20, 30]
        assert texts(aside, kind) == ["first 20", "first 30"]
    assert rows(run) == [0, 10, 40] and rows(aside) == [20, 30]
    assert alerts(run) == ["first 0", "first 10", "prepare"] and alerts(aside) == ["first 20", "first 30"]
    assert (aside / "train.json").is_file() and not (run / "train.json").exists()
    record = json.loads((aside / "replaced.json").read_text())
    assert (record["line"], record["next_line"], record["after"]) == (1, 2, 10)
    assert (record["reason"], record["command"], record["checkpoints"]) == ("a reason", "a command", [20, 30])


def test_a_start_from_the_model_moves_everything(run: Path) -> None:
    begin_line(run, line())
    assert steps(run / "checkpoints") == steps(run / "samples") == []
    assert rows(run) == [40] and alerts(run) == ["prepare"] and pointer(run) is None
    assert steps(run / "replaced/01/checkpoints") == [0, 10, 20, 30]


def test_the_first_line_replaces_nothing(tmp_path: Path) -> None:
    begun = begin_line(tmp_path, line())
    assert (begun.number, begun.replaced) == (1, None) and not (tmp_path / "replaced").exists()


def test_a_run_without_a_history_is_its_first_line(tmp_path: Path) -> None:
    save(tmp_path, "old", 10, 20)
    assert begin_line(tmp_path, line(kept=10)).number == 2
    assert [one.number for one in read_history(tmp_path).lines] == [1, 2]
    assert steps(tmp_path / "replaced/01/checkpoints") == [20]


@pytest.mark.parametrize(
    "point", ["_reset_pointer", "_move", "_move_lines", "_move_rungs", "write_record", "link_folder", "point_at"]
)
@pytest.mark.parametrize("start", ["earlier", "anew", "replaced"])
def test_a_kill_at_any_point_is_completed_by_the_next_start(
    run: Path, point: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of ``point`` is interrupted in turn, before and after it."""
    begin_line(run, line(kept=20))
    save(run, "second", 30, 40)
    (run / "train.json").write_text("{}")
    wanted = {
        "earlier": line(kept=10),
        "anew": line(),
        "replaced": line(kept=20, step=30, checkpoint="replaced/01/checkpoints/step-000030"),
    }[start]
    done = clone(run, run / "copies/done")
    begin_line(done, wanted)
    for number in range(1, 40):
        for after in (False, True):
            broken = clone(run, run / f"copies/broken-{number}-{after}")
            with monkeypatch.context() as patch:
                calls = interrupt(patch, point, number, after)
                with contextlib.suppress(KeyboardInterrupt):
                    begin_line(broken, wanted)
            if number > calls[0]:
                assert tree(broken) == tree(done)
                return
            named = pointer(broken)
            assert named is None or (broken / f"checkpoints/step-{named:06d}").is_dir()
            finish_line(broken)
            if current_line(broken) == 2:  # interrupted before the record: nothing has happened
                begin_line(broken, wanted)
            assert tree(broken) == tree(done), f"{point} {number} {'after' if after else 'before'}"


def clone(run: Path, target: Path) -> Path:
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("copies"))
    return target


def tree(run: Path) -> dict[str, str]:
    """Return the content of every file; the time of a move is left out."""
    found = {path.relative_to(run).as_posix(): path for path in run.rglob("*") if path.is_file()}
    return {
        name: "\n".join(text for text in path.read_text().splitlines() if "moved_at" not in text)
        for name, path in found.items()
    }


def interrupt(patch: pytest.MonkeyPatch, point: str, number: int, after: bool) -> list[int]:
    """Raise at the call ``number`` of ``point``. Return a list with the number of calls."""
    inner: Callable[..., object] = getattr(run_history, point)
    calls = [0]

    def call(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == number and not after:
            raise KeyboardInterrupt
        result = inner(*arguments)
        if calls[0] == number:
            raise KeyboardInterrupt
        return result

    patch.setattr(run_history, point, call)
    return calls


def test_an_older_line_comes_back_whole(run: Path) -> None:
    begin_line(run, line(kept=20))
    save(run, "second", 30, 40)
    begin_line(run, line(kept=10))
    save(run, "third", 20)
    begin_line(run, line())
    save(run, "fourth", 10)
    name = "replaced/01/checkpoints/step-000030"
    found = restored_intervals(read_history(run), run, name, 30)
    assert [(one.folder.name, one.low, one.high) for one in found] == [("01", 20, 30), ("02", 10, 20), ("03", -1, 10)]
    begin_line(run, line(kept=-1, step=30, checkpoint=name))
    assert texts(run) == texts(run, "samples") == ["first 0", "first 10", "first 20", "first 30"]
    assert rows(run) == [0, 40, 10, 20, 30] and pointer(run) == 30
    assert sorted(alerts(run)) == ["first 0", "first 10", "first 20", "first 30", "prepare"]
    kept = {one.name: texts(one) for one in sorted((run / "replaced").iterdir())}
    assert kept == {
        "01": ["first 30"],
        "02": ["first 20", "second 30", "second 40"],
        "03": ["first 0", "first 10", "third 20"],
        "04": ["fourth 10"],
    }


def test_a_record_of_rollbacks_of_an_older_version_is_read(tmp_path: Path) -> None:
    entry = {"number": 1, "start": 30, "to": 10, "learning_rate_ratio": 0.3, "reason": "soft", "moved": True}
    (tmp_path / "rollback.json").write_text(json.dumps({"rollbacks": [entry]}))
    history = read_history(tmp_path)
    assert history.current.rollbacks == [RollbackEntry(30, 10, 0.3, "soft")] and history.current.number == 2
    (tmp_path / "rollback.json").write_text('{"rollbacks": [{"to": 3}]}')
    with pytest.raises(CheckpointError, match=r"rollback\.json is no valid record"):
        read_history(tmp_path)


def test_a_history_that_names_a_folder_outside_is_refused(run: Path) -> None:
    begin_line(run, line(kept=10))
    path = run / "history.json"
    path.write_text(path.read_text().replace("replaced/01", "../elsewhere").replace('"moved": true', '"moved": false'))
    with pytest.raises(Exception, match="leads out of its folder"):
        finish_line(run)
