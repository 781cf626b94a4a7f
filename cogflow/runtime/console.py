"""Lines and tables for whoever watches the run. Only rank 0 speaks."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cogflow.runtime import ranks


def echo(text: str) -> None:
    """Print one line on rank 0 and flush it, so that a log file shows it at once."""
    if ranks.is_main():
        print(text, flush=True)


def table(rows: Sequence[Sequence[object]], columns: Sequence[str]) -> None:
    """Print ``rows`` under ``columns`` on rank 0. Cells are shown by ``str`` as they are, without markup; a log gets the full width."""
    if not ranks.is_main():
        return
    # A log has no width of its own: rich would assume 80 columns there and fold paths.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    console = Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)
    grid = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        grid.add_row(*("" if cell is None else str(cell) for cell in row))
    console.print(grid)
    sys.stdout.flush()
