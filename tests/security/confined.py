"""Run a function in a child process whose memory and time the operating system limits."""

from __future__ import annotations

import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

GIGABYTE = 1 << 30


class LimitExceededError(AssertionError):
    """The child was ended by its limits or failed."""


def run_confined(action: Callable[[], None], seconds: int, memory: int = GIGABYTE) -> None:
    """Run ``action()`` in a forked child that may use ``seconds`` and ``memory`` bytes more than this process has.

    Raises :class:`LimitExceededError` with the child's traceback, or for a child that the alarm or the limit ended.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_child(action, seconds, memory, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        raise LimitExceededError(f"the child was ended by {name} ({seconds} s, {memory} bytes)\n{text}")
    if os.WEXITSTATUS(status):
        raise LimitExceededError(text)


def _run_child(action: Callable[[], None], seconds: int, memory: int, writing: int) -> None:
    code = 1
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        action()
        code = 0
    except BaseException:  # noqa: BLE001 - reported by the parent
        os.write(writing, traceback.format_exc()[-20_000:].encode("utf-8", "replace"))
    finally:
        os._exit(code)


def deadline(seconds: float) -> Callable[[], bool]:
    """Return a function that tells whether ``seconds`` have passed since now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end
