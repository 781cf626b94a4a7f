"""Print lines and tables. Only rank 0 prints."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cogflow.runtime import ranks

LOG_WIDTH = 200
"""Columns of a table that is not printed on a terminal. rich would assume 80 there and fold paths."""


def echo(text: str) -> None:
    """Print one line on rank 0 and flush it, so that a log file shows it at once."""
    if ranks.is_main():
        print(text, flush=True)


def table(rows: Sequence[Sequence[object]], columns: Sequence[str]) -> None:
    """Print ``rows`` under ``columns`` on rank 0. Cells are printed by ``str``, without markup; None is empty."""
    if not ranks.is_main():
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else LOG_WIDTH
    console = Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)
    grid = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        grid.add_row(*("" if cell is None else str(cell) for cell in row))
    console.print(grid)
    sys.stdout.flush()
