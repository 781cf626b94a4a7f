"""Test progress output: a bar on a terminal, few plain lines in a log, none on other ranks."""

from __future__ import annotations

import io

import pytest

from cogflow.runtime import progress as module
from cogflow.runtime.console import echo, table
from cogflow.runtime.progress import clock, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_few_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])  # type: ignore[attr-defined]
    log = io.StringIO()
    with progress(100, "clips", stream=log) as bar:
        for index in range(100):
            now[0] += 0.25
            bar.advance(note=f"clip [{index}]")
    lines = log.getvalue().splitlines()
    assert lines == [
        "clips: 40/100 in 10 s, 15 s left  clip [39]",
        "clips: 80/100 in 20 s, 5.0 s left  clip [79]",
        "clips: 100/100 in 25 s  clip [99]",
    ]


def test_interrupted_work_shows_its_progress() -> None:
    log = io.StringIO()

    def interrupted() -> None:
        with progress(10, "clips", stream=log) as bar:
            bar.advance(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "clips: 4/10" in log.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    with progress(2, "clips [a]", stream=screen) as bar:
        bar.advance()
        bar.advance(note="last [b]")
    assert "2/2" in screen.getvalue() and "\x1b[" in screen.getvalue() and "clips [a]" in screen.getvalue()


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress(2, "clips") as bar:
        bar.advance(2)
    echo("hello")
    table([["a"]], ["b"])
    assert capsys.readouterr().out == ""


def test_a_table_shows_cells_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table([["[bold]x[/bold]", 1, None], ["/a/long/path/" + "p" * 100, 2.5, "y"]], ["name", "n", "z"])
    printed = capsys.readouterr().out
    assert "[bold]x[/bold]" in printed and "p" * 100 in printed and "None" not in printed


def test_durations_are_formatted() -> None:
    assert [clock(seconds) for seconds in (0.44, 9.96, 59.6, 185, 7800)] == [
        "0.4 s",
        "10 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
