"""How far long work has come: a bar on a terminal, now and then a plain line in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cogflow.runtime import ranks
from cogflow.runtime.heartbeat import report_progress

EVERY_SECONDS = 10.0
"""At most one line in a log per this many seconds, and the last one."""


class Advancing(Protocol):
    """What :func:`progress` yields."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """``n`` more pieces are done; ``note`` (short, replaces the last one) stands behind the bar."""


class _Silent:
    def advance(self, n: int = 1, note: str = "") -> None:
        report_progress()


class _Bar:
    def __init__(self, bar: Progress, total: int, description: str) -> None:
        self._bar = bar
        self._task = bar.add_task(description, total=total, note="")

    def advance(self, n: int = 1, note: str = "") -> None:
        report_progress()
        if note:
            self._bar.update(self._task, advance=n, note=note)
        else:
            self._bar.update(self._task, advance=n)


class _Lines:
    def __init__(self, stream: TextIO, total: int, description: str, unit: str) -> None:
        self._stream, self._total, self._description, self._unit = stream, total, description, unit
        self._done, self._note, self._shown = 0, "", -1
        self._started = self._spoke = time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        report_progress()
        self._done += n
        self._note = note or self._note
        now = time.monotonic()
        if now - self._spoke >= EVERY_SECONDS:
            self._say(now)

    def close(self) -> None:
        if self._done and self._shown != self._done:
            self._say(time.monotonic())

    def _say(self, now: float) -> None:
        self._spoke, self._shown = now, self._done
        spent = now - self._started
        left = ""
        if 0 < self._done < self._total:
            left = f", {clock(spent / self._done * (self._total - self._done))} left"
        note = f"  {self._note}" if self._note else ""
        print(f"{self._description}: {self._amount()} in {clock(spent)}{left}{note}", file=self._stream, flush=True)

    def _amount(self) -> str:
        if self._unit == "bytes":
            return f"{self._done / 1e9:.2f}/{self._total / 1e9:.2f} GB"
        return f"{self._done}/{self._total}"


@contextmanager
def progress(
    total: int, description: str, *, unit: str = "pieces", stream: TextIO | None = None
) -> Iterator[Advancing]:
    """Show work of ``total`` pieces: ``with progress(10, "clips") as bar: bar.advance()``. Silent off rank 0.

    ``unit``: pieces, or bytes, which are shown as such.
    Writes to ``stream`` (standard output): a live bar when that is a terminal, plain lines otherwise.
    """
    if not ranks.is_main():
        yield _Silent()
        return
    stream = stream or sys.stdout
    if stream.isatty():
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=32),
            DownloadColumn() if unit == "bytes" else MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
        )
        with Progress(*columns, console=Console(file=stream)) as bar:
            yield _Bar(bar, total, description)
        return
    lines = _Lines(stream, total, description, unit)
    try:
        yield lines
    finally:
        lines.close()


def clock(seconds: float) -> str:
    """``seconds`` as people say it: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
