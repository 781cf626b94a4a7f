"""Heartbeats: each rank writes its phase of work to ``<run>/ranks/``, so that the others can name a rank that hangs or
dies.

A rank enters a phase (:func:`enter_phase`), and progress bars report progress (:func:`report_progress`). A thread
writes the phase to ``rank-00003.json`` every few seconds. When there was no progress for the limit, the thread writes
the stack of every thread to a file, names the rank that the others wait for, and ends the process: a job that hangs
costs as much as one that works.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogflow.errors import CogflowError
from cogflow.files.printable import one_line
from cogflow.files.record_io import read_record, record_values
from cogflow.records.run_records import HeartbeatRecord
from cogflow.runtime import ranks, run_lock

FOLDER = "ranks"
BEAT_SECONDS = 5.0
SILENT_BEATS = 4
"""Beats without a heartbeat after which a rank on another host counts as gone, on the clock of the rank that asks.

On the same host its process is checked instead.
"""
STALLED = 1
"""Exit code of a process that its watchdog ends."""


@dataclass
class _Phase:
    """Phase of this process and the time of its last progress (monotonic seconds)."""

    name: str = "starting"
    progress_at: float = 0.0


_phase = _Phase()


def enter_phase(name: str) -> None:
    """Record that this process starts the phase ``name`` now. End it when it lost the lock of its run folder."""
    run_lock.end_if_lost()
    _phase.name, _phase.progress_at = name, time.monotonic()


def report_progress() -> None:
    """Record that the present phase makes progress."""
    _phase.progress_at = time.monotonic()


@dataclass(frozen=True)
class RankState:
    """State of a rank at its last heartbeat. ``gone``: its process has ended, or did not write while it was watched."""

    rank: int
    host: str
    phase: str
    gone: bool

    def line(self) -> str:
        """Return the state in words."""
        return (
            f"rank {self.rank} ({self.host}) {'is gone; its last phase' if self.gone else 'is in phase'}: {self.phase}"
        )


class Watchdog:
    """Context in which this rank writes heartbeats.

    ``limit``: seconds without progress after which the process ends; 0: never.

    ``end``: ends the process; tests replace it.
    """

    def __init__(self, run: Path, limit: float, end: Callable[[int], Any] = os._exit) -> None:
        self.folder, self.limit, self._end = run / FOLDER, limit, end
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.folder.mkdir(parents=True, exist_ok=True)
        enter_phase("starting")
        self._write_heartbeat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        # The last heartbeat stays when the process dies, and is removed when it ends in order.
        with contextlib.suppress(OSError):
            _file(self.folder, ranks.rank()).unlink(missing_ok=True)

    def others(self) -> list[RankState]:
        """Return the states of the other ranks. Of a rank on another host it is not known whether it is gone."""
        return read_states(self.folder, self._other_ranks())

    def watch_others(self) -> list[RankState]:
        """Return the states of the other ranks after the time in which every living rank writes once more.

        That is a second where all are on this host, whose processes can be looked up, and 20 seconds otherwise.
        """
        before = _read_heartbeats(self.folder, self._other_ranks())
        foreign = any(record.host != socket.gethostname() for record in before.values())
        time.sleep(SILENT_BEATS * BEAT_SECONDS if foreign else 1.0)
        return read_states(self.folder, self._other_ranks(), before)

    def _other_ranks(self) -> list[int]:
        return [rank for rank in range(ranks.world_size()) if rank != ranks.rank()]

    def _watch(self) -> None:
        while not self._stop.wait(min(BEAT_SECONDS, self.limit / 4 if self.limit else BEAT_SECONDS)):
            self._write_heartbeat()
            seconds = time.monotonic() - _phase.progress_at
            if self.limit and seconds > self.limit:
                self._report_stall(seconds)
                return

    def _write_heartbeat(self) -> None:
        record = HeartbeatRecord(ranks.rank(), socket.gethostname(), os.getpid(), _phase.name, time.time())
        # A heartbeat that cannot be written must not end the process.
        with contextlib.suppress(OSError):
            # Rename it, because ranks that stall together read each other while they write.
            written = self.folder / f".beat-{ranks.rank():05d}"
            written.write_text(json.dumps(record_values(record)))
            written.replace(_file(self.folder, ranks.rank()))

    def _report_stall(self, seconds: float) -> None:
        message = f"rank {ranks.rank()}: no progress for {seconds:.0f} s in phase: {_phase.name}"
        for state in blocking_ranks(self.watch_others() if ranks.world_size() > 1 else [], _phase.name):
            message += f"\n  {one_line(state.line())}"
        stacks = self.folder / f"rank-{ranks.rank():05d}.stack"
        with contextlib.suppress(OSError), stacks.open("w", encoding="utf-8") as file:
            file.write(message + "\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        print(
            f"error: {message}\n  The stacks of its threads are in {stacks}. Run the same command again to resume.",
            file=sys.stderr,
            flush=True,
        )
        self._end(STALLED)


def read_states(
    folder: Path, wanted: Sequence[int], before: Mapping[int, HeartbeatRecord] | None = None
) -> list[RankState]:
    """Return the state that each of the ranks ``wanted`` wrote last.

    A rank without a readable file has not started, or has ended. ``before``: heartbeats that were read long enough ago
    for every living rank to write again.
    """
    return [
        RankState(rank, record.host, record.phase, _is_gone(record, (before or {}).get(rank)))
        for rank, record in _read_heartbeats(folder, wanted).items()
    ]


def _read_heartbeats(folder: Path, wanted: Sequence[int]) -> dict[int, HeartbeatRecord]:
    found = {}
    for rank in wanted:
        with contextlib.suppress(CogflowError, OSError):
            found[rank] = read_record(_file(folder, rank), HeartbeatRecord)
    return found


def blocking_ranks(others: Sequence[RankState], own_phase: str) -> list[RankState]:
    """Return the ranks that this one waits for: those that are gone, or else those in another phase than most ranks."""
    if gone := [state for state in others if state.gone]:
        return gone
    most = Counter([own_phase, *(state.phase for state in others)]).most_common(1)[0][0]
    return [state for state in others if state.phase != most]


def _is_gone(record: HeartbeatRecord, before: HeartbeatRecord | None) -> bool:
    if record.host == socket.gethostname():
        try:
            os.kill(record.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return _is_zombie(record.pid)
    return record == before


def _is_zombie(pid: int) -> bool:
    """Return whether a process has ended and its parent has not collected it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (OSError, IndexError):
        return False


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"
