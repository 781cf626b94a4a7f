"""Define the result of one benchmark: a line, a table, and details for ``benchmark.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

Cell = str | float | int | None
"""``None`` in a table means that the measurement failed."""


@dataclass(frozen=True)
class BenchmarkResult:
    """Result of one benchmark. ``summary``: one line.

    ``columns`` and ``rows``: the table that is printed and logged. ``details``: more keys of the record.
    """

    summary: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    details: Mapping[str, object] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """Return the JSON object that ``benchmark.json`` holds as this benchmark's results."""
        return {"summary": self.summary, **self.details}


def format_cell(value: Cell) -> str:
    """Return a cell as text; a float has three significant digits."""
    if value is None:
        return "failed"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def median_or_none(values: Sequence[float | None]) -> float | None:
    """Return the median of the repeats that succeeded (not ``None``); ``None`` when none did."""
    measured = [value for value in values if value is not None]
    return median(measured) if measured else None
