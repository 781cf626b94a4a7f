"""Print lines and tables. Only rank 0 prints. Control characters are escaped (:mod:`cogflow.files.printable`)."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cogflow.files.printable import one_line, paragraph
from cogflow.runtime import ranks

LOG_WIDTH = 200
"""Columns of a table that is not printed on a terminal. rich would assume 80 there and fold paths."""


def echo(*lines: str) -> None:
    """Print each of ``lines`` on rank 0 and flush, so that a log file shows it at once.

    Line breaks inside of one of them are kept, but what follows is indented.
    """
    if ranks.is_main():
        print("\n".join(paragraph(line) for line in lines), flush=True)


def table(rows: Sequence[Sequence[object]], columns: Sequence[str]) -> None:
    """Print ``rows`` under ``columns`` on rank 0. Cells are printed by ``str``, without markup and on one line; None is
    empty."""
    if not ranks.is_main():
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else LOG_WIDTH
    console = Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)
    grid = Table(*map(one_line, columns), box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        grid.add_row(*("" if cell is None else one_line(str(cell)) for cell in row))
    console.print(grid)
    sys.stdout.flush()
