"""Run a function in a forked child whose memory and time the operating system limits."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEGABYTES = 768
"""Address space that a child may add. Each thread of the C library reserves 64 MB of it."""
SECONDS = 20


def run_bounded(function: Callable[[], Any], seconds: int = SECONDS, megabytes: int = MEGABYTES) -> Any:
    """Return what ``function`` returns in a forked child, as JSON. Fails when the child dies or raises.

    ``SIGALRM`` ends the child after ``seconds``; ``RLIMIT_AS`` and ``RLIMIT_CPU`` limit it, too.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run_child(function, writer, seconds, megabytes)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        raise AssertionError(f"the child died of {signal.Signals(os.WTERMSIG(status)).name}")
    result = json.loads(answer)
    if "error" in result:
        raise AssertionError(f"the child raised {result['error']}")
    return result["value"]


def _run_child(function: Callable[[], Any], writer: int, seconds: int, megabytes: int) -> None:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + megabytes * 2**20
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            answer = {"value": function()}
        except Exception as error:  # noqa: BLE001 - reported to the parent
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(writer, json.dumps(answer).encode())
    finally:
        os._exit(0)
