"""A request to stop, as SLURM and people send it: noted when it comes, acted on between two steps, by all ranks at once."""

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
"""A terminal's Ctrl-C reaches every process of the group, and torchrun sends it to its workers once more: so long that is one request."""
REPEATED = "COGFLOW_REPEATED"
"""Variable with the names of signals that are one request however often they come: a launcher cannot know whether training listens yet, and
sends its own again until training ends."""


class StopRequest:
    """Context in which SIGTERM, SIGUSR1 and SIGINT only set a flag. A second one ends the process at once, with 128 + its number:
    what is half-written lies beside its place and is swept away by the next run."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._when = 0.0
        self._repeated = os.environ.get(REPEATED, "").split(",")
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def anywhere(self) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank. Collective."""
        return ranks.any_rank(self.received is not None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self.received is None:
            self.received, self._when = name, now
        elif name not in self._repeated and now - self._when > ECHO_SECONDS:
            # Not through Python's own end: another rank may be waited for in a collective, and threads may be writing.
            sys.stdout.flush()
            os.write(2, f"{name} after {self.received}: ending at once; no checkpoint of this moment\n".encode())
            os._exit(128 + number)
