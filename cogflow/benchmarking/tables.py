"""How figures are shown."""

from __future__ import annotations

from typing import Any

Table = tuple[list[str], list[list[Any]]]
"""Columns and rows."""


def shown(value: object) -> str:
    """A cell in words: three digits of a figure."""
    return "failed" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
