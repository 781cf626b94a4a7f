"""Where ranks stand, who is named when nothing moves, and that what moves is left alone."""

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


def wrote(folder: Path, rank: int, **more: object) -> None:
    line = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "what": "step 3", "time": time.time()}
    (folder / f"rank-{rank:05d}.json").write_text(json.dumps(line | more))


def test_what_moves_is_left_alone_and_what_stands_is_ended_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    with Watchdog(tmp_path, 0.4, end=ended.append) as watchdog:
        for _ in range(8):
            time.sleep(0.1)
            report_progress()
        assert ended == []
        enter_phase("step 8: backward")
        wrote(watchdog.folder, 1, what="step 8: waiting for data")
        time.sleep(0.9)
    assert ended == [heartbeat.STALLED]
    said = capsys.readouterr().err
    assert "nothing has moved for" in said and "it stands at: step 8: backward" in said
    stacks = (tmp_path / "ranks" / "rank-00000.stack").read_text()
    assert "test_heartbeat.py" in stacks and "most recent call first" in stacks
    assert not (tmp_path / "ranks" / "rank-00000.json").exists(), "it ended in order"


def test_a_rank_is_never_missed_while_it_writes(tmp_path: Path) -> None:
    """Ranks that stall together read each other in the very moment in which they write."""
    with Watchdog(tmp_path, 0) as watchdog:
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                watchdog._beat()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            missed = sum(not read_states(watchdog.folder, [0]) for _ in range(3000))
        finally:
            stop.set()
            writer.join()
    assert missed == 0
    assert list(watchdog.folder.iterdir()) == []


def test_zero_minutes_watch_nothing(tmp_path: Path) -> None:
    ended: list[int] = []
    with Watchdog(tmp_path, 0, end=ended.append):
        enter_phase("long")
        time.sleep(0.5)
    assert ended == []


def test_a_process_that_is_gone_is_known_on_this_host_and_by_silence_on_another(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    wrote(tmp_path, 0)
    wrote(tmp_path, 1, pid=dead.pid)
    wrote(tmp_path, 2, host="another", time=time.time() - 1)
    wrote(tmp_path, 3, host="another", time=time.time() - 3600)
    (tmp_path / "rank-00004.json").write_text("{")
    assert [(place.rank, place.gone) for place in read_states(tmp_path, range(6))] == [
        (0, False),
        (1, True),
        (2, False),
        (3, True),
    ]


def test_a_zombie_is_gone(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    wrote(tmp_path, 0, pid=child.pid)
    assert read_states(tmp_path, [0])[0].gone
    child.wait()


def test_whom_one_waits_for() -> None:
    def at(rank: int, what: str, gone: bool = False) -> RankState:
        return RankState(rank, "host", what, gone)

    assert blocking_ranks([at(1, "step 3"), at(2, "step 3: waiting for data"), at(3, "step 3")], "step 3") == [
        at(2, "step 3: waiting for data")
    ]
    assert blocking_ranks([at(1, "a"), at(2, "b", gone=True)], "c") == [at(2, "b", gone=True)]
    assert blocking_ranks([at(1, "step 3")], "step 3") == []
