"""Show the progress of long work: a bar on a terminal, a plain line from time to time in a log."""

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

from cogflow.files.printable import one_line
from cogflow.runtime import ranks
from cogflow.runtime.heartbeat import report_progress

EVERY_SECONDS = 10.0
"""Seconds between the lines in a log, at least. The last line is always printed."""


class Advancing(Protocol):
    """The bar that :func:`progress` yields."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more pieces as done. ``note``: a short text behind the bar, which replaces the last one."""


class _SilentBar:
    def advance(self, n: int = 1, note: str = "") -> None:
        report_progress()


class _TerminalBar:
    def __init__(self, bar: Progress, total: int, description: str) -> None:
        self._bar = bar
        self._task = bar.add_task(one_line(description), total=total, note="")

    def advance(self, n: int = 1, note: str = "") -> None:
        report_progress()
        if note:
            self._bar.update(self._task, advance=n, note=one_line(note))
        else:
            self._bar.update(self._task, advance=n)


class _LogLines:
    def __init__(self, stream: TextIO, total: int, description: str, unit: str) -> None:
        self._stream = stream
        self._total = total
        self._description = one_line(description)
        self._unit = unit
        self._done = 0
        self._note = ""
        self._printed_done = -1
        self._started = self._last_print = time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        report_progress()
        self._done += n
        self._note = one_line(note) or self._note
        now = time.monotonic()
        if now - self._last_print >= EVERY_SECONDS:
            self._print(now)

    def close(self) -> None:
        """Print the last line, unless it is printed already."""
        if self._done and self._printed_done != self._done:
            self._print(time.monotonic())

    def _print(self, now: float) -> None:
        self._last_print = now
        self._printed_done = self._done
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
    """Show the progress of ``total`` pieces: ``with progress(10, "clips") as bar: bar.advance()``. Silent off rank 0.

    ``unit``: pieces, or bytes, which are printed in GB. A live bar on ``stream`` (standard output) when it is a
    terminal, plain lines otherwise.
    """
    if not ranks.is_main():
        yield _SilentBar()
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
            yield _TerminalBar(bar, total, description)
        return
    lines = _LogLines(stream, total, description, unit)
    try:
        yield lines
    finally:
        lines.close()


def clock(seconds: float) -> str:
    """Return ``seconds`` in usual notation: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
