"""Call W&B's service with a time limit. It is another process, which may die, hang or wait for its network."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

END_SECONDS = 10.0
"""Time for W&B's service to write what it holds and end."""


class NoAnswerError(TimeoutError):
    """A call is not finished in its time."""


class WandbCaller:
    """One thread that makes calls in the order they were given, so that the work need not wait for them."""

    def __init__(self) -> None:
        self._actions: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._queued: deque[tuple[float, str, Future[Any]]] = deque()
        # A daemon: a call that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="wandb calls", daemon=True)
        self._thread.start()

    def call(self, action: Callable[[], T], seconds: float) -> T:
        """Return ``action()``. Raises :class:`NoAnswerError` after ``seconds``; the thread is then left to itself."""
        if threading.current_thread() is self._thread:  # called inside another call, which waits for this one
            return action()
        future = self.submit(action)
        wait([future], seconds)
        if not future.done():
            raise NoAnswerError(f"no answer in {seconds:.0f} s")
        return future.result()

    def queue(self, name: str, action: Callable[[], Any]) -> None:
        """Queue ``action`` without waiting. :meth:`failures` returns what it raises under ``name``."""
        self._queued.append((time.monotonic(), name, self.submit(action)))

    def failures(self, seconds: float) -> list[tuple[str, Exception]]:
        """Return what queued actions have raised since the last call; :class:`NoAnswerError` for one not done in
        ``seconds``."""
        errors: list[tuple[str, Exception]] = []
        while self._queued and self._queued[0][2].done():
            _, name, future = self._queued.popleft()
            if isinstance(error := future.exception(), Exception):
                errors.append((name, error))
        if self._queued and time.monotonic() - self._queued[0][0] > seconds:
            _, name, _ = self._queued.popleft()
            errors.append((name, NoAnswerError(f"no answer in {seconds:.0f} s")))
        return errors

    def close(self) -> None:
        """Let the thread end after the actions that are queued."""
        self._actions.put(None)

    def submit(self, action: Callable[[], T]) -> Future[T]:
        """Queue ``action`` without waiting, and return what it will return or raise."""
        future: Future[T] = Future()
        self._actions.put((future, action))
        return future

    def _work(self) -> None:
        while (item := self._actions.get()) is not None:
            future, action = item
            try:
                future.set_result(action())
            except Exception as error:  # noqa: BLE001 - raised where the result is read
                future.set_exception(error)
            except BaseException as error:  # noqa: BLE001
                # W&B cancelled a task or asked to exit. In a thread of its own that ends nothing else.
                future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))


def call_within(seconds: float, action: Callable[[], T]) -> T:
    """Return ``action()`` from a new thread.

    Raises :class:`NoAnswerError` after ``seconds``. Allowed inside another call.
    """
    caller = WandbCaller()
    try:
        return caller.call(action, seconds)
    finally:
        caller.close()


def end_service(*, at_once: bool) -> None:
    """End W&B's service, ``at_once`` or after :data:`END_SECONDS` in which it writes what it holds.

    Otherwise the process would wait for it at its end, for ever when the service hangs.
    """
    if not at_once:
        _tear_down()
    for pid in service_pids():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    _tear_down()


def service_pids() -> list[int]:
    """Return the process ids of W&B's services that this process started. Only Linux lists them."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            name, _, rest = status.read_text().partition("(")[2].rpartition(")")
            if name.startswith("wandb") and int(rest.split()[1]) == os.getpid():
                found.append(int(status.parent.name))
    return found


def _tear_down() -> None:
    """Let W&B end its service in order, and start another one with the next run."""

    def tear_down() -> None:
        import wandb

        wandb.teardown()

    # W&B raises when the service is gone already.
    with contextlib.suppress(Exception):
        call_within(END_SECONDS, tear_down)
