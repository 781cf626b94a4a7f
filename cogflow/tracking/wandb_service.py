"""W&B's service, a process beside ours that may die, stand still or wait for its network: nobody waits for it without end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

END_SECONDS = 10.0


class NoAnswer(TimeoutError):
    """What was asked is still under way."""


def within(seconds: float, action: Callable[[], T]) -> T:
    """What ``action()`` gives, waited for no longer than ``seconds``; then :class:`NoAnswer`, and its thread is left to itself."""
    values: list[T] = []
    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            values.append(action())
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors and not isinstance(errors[0], Exception):
        # A task that W&B cancelled, or its wish to exit: in a thread of its own that ends nothing else.
        raise RuntimeError(f"{type(errors[0]).__name__}: {errors[0]}") from errors[0]
    if errors:
        raise errors[0]
    if not values:
        raise NoAnswer(f"no answer in {seconds:.0f} s")
    return values[0]


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
