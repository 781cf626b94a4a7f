"""W&B's service, a process beside ours that may die, stand still or wait for its network: nobody waits for it without end."""

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


class NoAnswer(TimeoutError):
    """What was asked is still under way."""


class Caller:
    """One thread that makes the calls to W&B's service in the order in which they were given, so that the work need not wait for them."""

    def __init__(self) -> None:
        self._actions: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._handed: deque[tuple[float, str, Future[None]]] = deque()
        # A daemon: one that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="wandb calls", daemon=True)
        self._thread.start()

    def ask(self, action: Callable[[], T], seconds: float) -> T:
        """What ``action()`` gives, waited for no longer than ``seconds``; then :class:`NoAnswer`, and the thread is left to itself."""
        if threading.current_thread() is self._thread:  # asked inside another call, which waits for this one
            return action()
        future = self._give(action)
        wait([future], seconds)
        if not future.done():
            raise NoAnswer(f"no answer in {seconds:.0f} s")
        return future.result()

    def hand(self, name: str, action: Callable[[], Any]) -> None:
        """Have ``action`` called, and do not wait; what it raises is told by :meth:`failed` under ``name``."""
        self._handed.append((time.monotonic(), name, self._give(action)))

    def failed(self, seconds: float) -> list[tuple[str, Exception]]:
        """What actions that were handed over have raised since; a :class:`NoAnswer` where one is not done after ``seconds``."""
        errors: list[tuple[str, Exception]] = []
        while self._handed and self._handed[0][2].done():
            _, name, future = self._handed.popleft()
            if isinstance(error := future.exception(), Exception):
                errors.append((name, error))
        if self._handed and time.monotonic() - self._handed[0][0] > seconds:
            _, name, _ = self._handed.popleft()
            errors.append((name, NoAnswer(f"no answer in {seconds:.0f} s")))
        return errors

    def close(self) -> None:
        """Let the thread end after what it has been given."""
        self._actions.put(None)

    def _give(self, action: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._actions.put((future, action))
        return future

    def _work(self) -> None:
        while (given := self._actions.get()) is not None:
            future, action = given
            try:
                future.set_result(action())
            except Exception as error:  # noqa: BLE001 - handed to who asked
                future.set_exception(error)
            except BaseException as error:  # noqa: BLE001
                # A task that W&B cancelled, or its wish to exit: in a thread of its own that ends nothing else.
                future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))


def within(seconds: float, action: Callable[[], T]) -> T:
    """What ``action()`` gives in a thread of its own: :meth:`Caller.ask` for what is asked once, or inside another call."""
    caller = Caller()
    try:
        return caller.ask(action, seconds)
    finally:
        caller.close()


def end_service(*, at_once: bool) -> None:
    """End W&B's service: ``at_once``, or when it has had some seconds to write what it holds. Not ended, it would be waited for at our
    process's end, for ever where it stands still."""
    if not at_once:
        _forget()
    for pid in children():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    _forget()


def _forget() -> None:
    """Have W&B end its service in order, and start another one with the next run."""

    def teardown() -> None:
        import wandb

        wandb.teardown()

    # It complains of a service that is gone.
    with contextlib.suppress(Exception):
        within(END_SECONDS, teardown)


def children() -> list[int]:
    """W&B's services that this process started, as Linux lists them; elsewhere none are found."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            name, _, rest = status.read_text().partition("(")[2].rpartition(")")
            if name.startswith("wandb") and int(rest.split()[1]) == os.getpid():
                found.append(int(status.parent.name))
    return found
