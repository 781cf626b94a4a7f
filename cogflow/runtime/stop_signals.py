"""Stop requests, which SLURM and users send as signals: recorded when they come, acted on between two steps, by all
ranks together.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

from cogflow.runtime import ranks

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_SECONDS = 3.0
"""Seconds in which repeated signals are one request: a terminal's Ctrl-C reaches every process, and torchrun sends it
to its workers again.
"""
REPEATED = "COGFLOW_REPEATED"
"""Environment variable with the names of signals that count once however often they come.

A launcher cannot know whether training listens yet, and sends its own signal again until training ends.
"""


class StopRequest:
    """Context in which SIGTERM, SIGUSR1 and SIGINT only set a flag.

    A second signal ends the process at once, with 128 + its number.

    Files that are half written then have hidden names, and the next run removes them.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0
        self._repeated = os.environ.get(REPEATED, "").split(",")
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._receive) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def on_any_rank(self) -> bool:
        """Return whether any rank was asked to stop; the same answer on every rank. Collective."""
        return ranks.any_rank(self.received is not None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self.received is None:
            self.received, self._received_at = name, now
        elif name not in self._repeated and now - self._received_at > ECHO_SECONDS:
            # Not by sys.exit: another rank may wait in a collective, and threads may be writing.
            sys.stdout.flush()
            os.write(2, f"{name} after {self.received}: ending at once; this moment is not saved\n".encode())
            os._exit(128 + number)
