"""Test that a rank without progress is ended and named by its phase, and that ranks with progress are left alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cogflow.runtime import heartbeat
from cogflow.runtime.heartbeat import RankState, Watchdog, blocking_ranks, enter_phase, read_states, report_progress


def write_heartbeat(folder: Path, rank: int, **values: object) -> None:
    """Write a heartbeat of this process; ``values`` replace fields."""
    known = {"version": 1, "rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "phase": "step 3"}
    (folder / f"rank-{rank:05d}.json").write_text(json.dumps({**known, "time": time.time(), **values}))


def test_a_process_without_progress_is_ended_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    with Watchdog(tmp_path, 0.4, end=ended.append) as watchdog:
        for _ in range(8):
            time.sleep(0.1)
            report_progress()
        assert ended == []
        enter_phase("step 8: backward")
        write_heartbeat(watchdog.folder, 1, phase="step 8: waiting for data")
        time.sleep(0.9)
    assert ended == [heartbeat.STALLED]
    message = capsys.readouterr().err
    assert "no progress for" in message
    assert "in phase: step 8: backward" in message
    stacks = (tmp_path / "ranks" / "rank-00000.stack").read_text()
    assert "test_heartbeat.py" in stacks
    assert "most recent call first" in stacks
    assert not (tmp_path / "ranks" / "rank-00000.json").exists(), "the block ended in order"


def test_a_heartbeat_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    """Ranks that stall together read each other's heartbeats while they write their own."""
    with Watchdog(tmp_path, 0) as watchdog:
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                watchdog._write_heartbeat()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            missed = sum(not read_states(watchdog.folder, [0]) for _ in range(3000))
        finally:
            stop.set()
            writer.join()
    assert missed == 0
    assert list(watchdog.folder.iterdir()) == []


def test_a_limit_of_zero_never_ends_the_process(tmp_path: Path) -> None:
    ended: list[int] = []
    with Watchdog(tmp_path, 0, end=ended.append):
        enter_phase("long")
        time.sleep(0.5)
    assert ended == []


def test_a_rank_is_gone_by_its_process_on_this_host_and_by_silence_on_another(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write_heartbeat(tmp_path, 0)
    write_heartbeat(tmp_path, 1, pid=dead.pid)
    # The clock of the other host is wrong by an hour.
    write_heartbeat(tmp_path, 2, host="another", time=time.time() + 3600)
    write_heartbeat(tmp_path, 3, host="another", time=time.time() - 3600)
    (tmp_path / "rank-00004.json").write_text("{")
    states = [(state.rank, state.gone) for state in read_states(tmp_path, range(6))]
    assert states == [(0, False), (1, True), (2, False), (3, False)]
    before = heartbeat._read_heartbeats(tmp_path, range(6))
    write_heartbeat(tmp_path, 2, host="another", time=time.time() - 3595)
    states = [(state.rank, state.gone) for state in read_states(tmp_path, range(6), before)]
    assert states == [(0, False), (1, True), (2, False), (3, True)]


def test_a_zombie_process_counts_as_ended(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    write_heartbeat(tmp_path, 0, pid=child.pid)
    assert read_states(tmp_path, [0])[0].gone
    child.wait()


def test_ranks_that_are_gone_or_in_another_phase_are_blocking() -> None:
    def state(rank: int, phase: str, gone: bool = False) -> RankState:
        return RankState(rank, "host", phase, gone)

    others = [state(1, "step 3"), state(2, "step 3: waiting for data"), state(3, "step 3")]
    assert blocking_ranks(others, "step 3") == [others[1]]
    assert blocking_ranks([state(1, "a"), state(2, "b", gone=True)], "c") == [state(2, "b", gone=True)]
    assert blocking_ranks([state(1, "step 3")], "step 3") == []
