"""Test which signals count as a second request to stop, and which repeat the first."""

from __future__ import annotations

import os
import signal

import pytest

from cogflow.runtime import stop_signals
from cogflow.runtime.stop_signals import REPEATED, StopRequest


class Ended(Exception):
    pass


def send(first: signal.Signals, second: signal.Signals, monkeypatch: pytest.MonkeyPatch, pause: float) -> str | None:
    """Send ``second`` ``pause`` seconds after ``first``; return what was received. Raise ``Ended`` where the process
    would end.
    """

    def end(code: int) -> None:
        raise Ended(code)

    now = [100.0]
    monkeypatch.setattr(stop_signals.time, "monotonic", lambda: now[0])  # type: ignore[attr-defined]
    monkeypatch.setattr(stop_signals.os, "_exit", end)  # type: ignore[attr-defined]
    with StopRequest() as request:
        os.kill(os.getpid(), first)
        now[0] += pause
        os.kill(os.getpid(), second)
        return request.received


USR1, TERM = signal.SIGUSR1, signal.SIGTERM


@pytest.mark.parametrize(
    ("repeated", "first", "second", "pause"),
    [("SIGUSR1", USR1, USR1, 60), ("SIGUSR1", TERM, USR1, 60), ("", USR1, USR1, 2)],
)
def test_repeated_signals_are_one_request(
    monkeypatch: pytest.MonkeyPatch, repeated: str, first: signal.Signals, second: signal.Signals, pause: float
) -> None:
    monkeypatch.setenv(REPEATED, repeated)
    assert send(first, second, monkeypatch, pause) == first.name


@pytest.mark.parametrize(("repeated", "first", "second"), [("", USR1, USR1), ("SIGUSR1", USR1, TERM)])
def test_a_second_signal_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, repeated: str, first: signal.Signals, second: signal.Signals
) -> None:
    monkeypatch.setenv(REPEATED, repeated)
    with pytest.raises(Ended) as ended:
        send(first, second, monkeypatch, 60)
    assert ended.value.args == (128 + second,)
