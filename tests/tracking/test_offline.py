"""Test that one command uploads every offline folder of a run, also after kills, with W&B's own ``wandb sync``."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cogflow.config.config import Config
from cogflow.files.record_io import write_record
from cogflow.records.history_records import HistoryRecord, RunLine
from cogflow.records.run_records import RunToken
from cogflow.tracking.tracker import open_tracker
from cogflow.tracking.wandb_folders import drop_incomplete_record, one_upload_line, sync_command, unsynced_folders
from tests.faults.loopback import Loopback

SECOND = RunLine(2, "2026-01-01T00:00:00Z", "stage.resume=never", "", {})


class ResumingServer(Loopback):
    """A W&B server that keeps the rows of one run and tells how many it has. ``rows``: (W&B's count, step)."""

    def __init__(self) -> None:
        super().__init__("well")
        self.rows: list[tuple[int, int]] = []
        self._exists = False

    def _data(self, body: bytes) -> dict[str, object]:
        text = gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body
        if b"wandb-history.jsonl" in text and b"createRunFiles" not in text:
            content = json.loads(text)["files"]["wandb-history.jsonl"]["content"]
            self.rows += [(row["_step"], row["step"]) for row in map(json.loads, content)]
        if b"RunResumeStatus" in text:
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}, "bucket": self._run()}}
        self._exists |= b"upsertBucket" in text
        return super()._data(text)

    def _run(self) -> dict[str, object] | None:
        if not self._exists:
            return None
        tail = [json.dumps({"_step": max(count for count, _ in self.rows), "_runtime": 1})]
        counts = {"historyLineCount": len(self.rows), "eventsLineCount": 0, "logLineCount": 0}
        texts = {"summaryMetrics": "{}", "historyTail": json.dumps(tail), "eventsTail": "[]", "config": "{}"}
        started = {"tags": [], "wandbConfig": json.dumps({"t": 1})}
        return {"__typename": "Run", "id": "x", "name": "run", "displayName": "run", **counts, **texts, **started}


def session(config: Config, folder: Path, steps: tuple[int, ...], stage: str = "train") -> Path:
    """Log a session and return its folder."""
    with open_tracker(config, stage, folder) as tracker:
        for step in steps:
            tracker.log(step, {"train/loss": 1.0 / step})
        return Path(tracker.url_or_dir)


def written(folder: Path) -> Path:
    """Return the .wandb file of a session after W&B's service has written its end."""
    (file,) = folder.glob("*.wandb")
    size = -1
    while size != (size := file.stat().st_size):
        time.sleep(0.3)
    return file


@pytest.mark.slow
def test_the_printed_command_uploads_every_session_also_after_a_kill(
    tmp_path: Path, config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a run"
    first = written(session(config, folder, (1, 2, 3, 4)))
    first.write_bytes(first.read_bytes()[:-10])  # as a kill leaves it
    second = folder / "wandb" / "offline-run-20260101_000000-killed" / first.name  # killed before it wrote its run
    second.parent.mkdir()
    second.write_bytes(first.read_bytes()[:7])
    capfd.readouterr()
    written(session(config, folder, (3, 4, 5)))
    command = capfd.readouterr().out.partition("to upload this run: ")[2].splitlines()[0]
    words = shlex.split(command)
    assert words[:2] == ["wandb", "sync"] and len(words) == 4
    server = ResumingServer()
    with server:
        env = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40}
        program = str(Path(sys.executable).parent / "wandb")
        done = subprocess.run([program, *words[1:]], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "ERROR" not in done.stdout + done.stderr, done.stdout + done.stderr
    # Rows of repeated steps follow the former ones: no row is lost, and the newest value of a step is the last.
    assert [step for _, step in server.rows] == [1, 2, 3, 4, 3, 4, 5]
    assert [count for count, _ in server.rows] == sorted({count for count, _ in server.rows})
    assert sync_command(folder) == ""


def test_the_command_names_every_stage_of_the_current_line(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, train = session(config, tmp_path, (1,), "prepare"), session(config, tmp_path, (1,))
    assert sync_command(tmp_path) == f"wandb sync {prepare} && wandb sync {train}"
    write_record(tmp_path / HistoryRecord.file_name, HistoryRecord([SECOND]))
    capsys.readouterr()
    with one_upload_line(tmp_path):
        again = session(config, tmp_path, (1,))
        export = session(config, tmp_path, (1,), "export")
        session(config, tmp_path, (2,))
    *folders, last = unsynced_folders(tmp_path)
    assert folders == [prepare, again, export] and last.name.startswith("offline-run-")
    assert sync_command(tmp_path) == (f"wandb sync {prepare} && wandb sync {again} {last} && wandb sync {export}")
    assert capsys.readouterr().out == f"W&B offline; to upload this run: {sync_command(tmp_path)}\n"
    for uploaded in (again, last):
        next(uploaded.glob("*.wandb")).with_suffix(".wandb.synced").touch()
    other = tmp_path / "wandb" / "offline-run-20260101_000000-other-train"
    other.mkdir()
    (other / "run-other-train.wandb").touch()
    assert unsynced_folders(tmp_path) == [prepare, export]


def test_a_folder_without_a_run_is_left_out(tmp_path: Path) -> None:
    write_record(tmp_path / "wandb" / RunToken.file_name, RunToken("ab"))
    folder = tmp_path / "wandb" / "offline-run-20260101_000000-ab-train"
    folder.mkdir()
    assert unsynced_folders(tmp_path) == []
    file = folder / "run-ab-train.wandb"
    file.write_bytes(b":W&B\0\0\0")
    assert unsynced_folders(tmp_path) == [folder]  # it may be written just now
    os.utime(file, (time.time() - 90, time.time() - 90))
    assert unsynced_folders(tmp_path) == [] and drop_incomplete_record(file) == 0


def test_only_a_cut_off_record_is_dropped(tmp_path: Path, config: Config) -> None:
    file = written(session(config, tmp_path, (1, 2, 3)))
    whole = file.read_bytes()
    assert drop_incomplete_record(file) == 0 and file.read_bytes() == whole
    file.write_bytes(whole[:-3])
    removed = drop_incomplete_record(file)
    assert removed > 0 and file.read_bytes() == whole[: len(whole) - 3 - removed]
    damaged = bytearray(whole + bytes(40000))
    damaged[100] ^= 1
    file.write_bytes(damaged)
    assert drop_incomplete_record(file) == 0 and file.read_bytes() == damaged
