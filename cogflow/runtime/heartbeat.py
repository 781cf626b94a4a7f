"""Where each rank stands: said in ``<run>/ranks/`` while it works, so that one that hangs or dies can be named by the others.

A rank marks what it begins (:func:`mark`); progress bars count as a sign of life (:func:`touch`). A thread writes the mark to
``rank-00003.json`` now and then. When nothing has moved for the limit, it writes down where all threads stand, names the rank that the
others wait for, and ends the process: a job that hangs costs as much as one that works.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogflow.runtime import ranks

FOLDER = "ranks"
BEAT_SECONDS = 5.0
SILENT_BEATS = 4
"""A rank on another host that has not written for so many beats is taken for dead; on the same host its process is looked for."""
STALLED = 1
"""Exit code of a process that its watchdog ends."""


@dataclass
class _State:
    what: str = "starting"
    since: float = 0.0


_state = _State()


def enter_phase(what: str) -> None:
    """This process begins ``what`` now."""
    _state.what, _state.since = what, time.monotonic()


def report_progress() -> None:
    """What was begun is moving on."""
    _state.since = time.monotonic()


@dataclass(frozen=True)
class RankState:
    """Where a rank stood when it last said so. ``gone``: its process is no more, or has not written for long."""

    rank: int
    host: str
    what: str
    gone: bool

    def line(self) -> str:
        return f"rank {self.rank} ({self.host}) {'is gone; it stood' if self.gone else 'stands'} at: {self.what}"


class Watchdog:
    """Context in which this rank says where it stands. ``limit``: seconds without a move after which the process ends; 0: never.

    ``end``: what ends it, for tests.
    """

    def __init__(self, run: Path, limit: float, end: Callable[[int], Any] = os._exit) -> None:
        self.folder, self.limit, self._end = run / FOLDER, limit, end
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.folder.mkdir(parents=True, exist_ok=True)
        enter_phase("starting")
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        # What was said last stays when the process dies, and goes when it ends in order.
        with contextlib.suppress(OSError):
            _file(self.folder, ranks.rank()).unlink(missing_ok=True)

    def others(self, wait: float = 0.0) -> list[RankState]:
        """Where the other ranks stand, after ``wait`` seconds in which those that live write once more."""
        time.sleep(wait)
        return read_states(self.folder, [rank for rank in range(ranks.world_size()) if rank != ranks.rank()])

    def _watch(self) -> None:
        while not self._stop.wait(min(BEAT_SECONDS, self.limit / 4 if self.limit else BEAT_SECONDS)):
            self._beat()
            standing = time.monotonic() - _state.since
            if self.limit and standing > self.limit:
                self._stalled(standing)
                return

    def _beat(self) -> None:
        line = {
            "rank": ranks.rank(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "what": _state.what,
            "time": time.time(),
        }
        # A sign of life that cannot be written must not end what lives.
        with contextlib.suppress(OSError):
            # In one piece: ranks that stall together read each other in the very beat in which they write.
            written = self.folder / f".beat-{ranks.rank():05d}"
            written.write_text(json.dumps(line))
            os.replace(written, _file(self.folder, ranks.rank()))

    def _stalled(self, seconds: float) -> None:
        message = f"rank {ranks.rank()}: nothing has moved for {seconds:.0f} s; it stands at: {_state.what}"
        others = self.others()
        named = blocking_ranks(others, _state.what)
        if named:
            message += "".join(f"\n  {place.line()}" for place in named)
        stacks = self.folder / f"rank-{ranks.rank():05d}.stack"
        with contextlib.suppress(OSError), open(stacks, "w", encoding="utf-8") as file:
            file.write(message + "\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        print(
            f"error: {message}\n  Where its threads stand is in {stacks}. Run the same command again to go on.",
            file=sys.stderr,
            flush=True,
        )
        self._end(STALLED)


def read_states(folder: Path, of: Sequence[int]) -> list[RankState]:
    """What the ranks ``of`` wrote last; a rank without a file has never begun, or has ended."""
    found = []
    for rank in of:
        try:
            line = json.loads(_file(folder, rank).read_text())
            found.append(RankState(rank, str(line["host"]), str(line["what"]), _gone(line)))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def blocking_ranks(others: Sequence[RankState], mine: str) -> list[RankState]:
    """Whom one waits for: ranks that are gone; else those that stand elsewhere than most do."""
    if gone := [place for place in others if place.gone]:
        return gone
    most = Counter([mine, *(place.what for place in others)]).most_common(1)[0][0]
    return [place for place in others if place.what != most]


def _gone(line: dict[str, Any]) -> bool:
    if line["host"] == socket.gethostname():
        try:
            os.kill(int(line["pid"]), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return _zombie(int(line["pid"]))
    return time.time() - float(line["time"]) > SILENT_BEATS * BEAT_SECONDS


def _zombie(pid: int) -> bool:
    """Killed, and not yet taken note of by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (OSError, IndexError):
        return False


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"
