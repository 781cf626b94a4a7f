"""Format numbers, changes and nested JSON for reading."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from cogflow.files.record_io import JsonValue


def short(value: float) -> str:
    """Return three significant digits in usual notation: 0.123, 12.3, 4e-4, 1.5e6."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def relative_change(first: float, last: float) -> str:
    """Return how far ``last`` is from ``first``: +12 %, −8 %, ±0 %; empty when ``first`` is zero."""
    if not first:
        return ""
    percent = round(100 * (last / first - 1))
    return "±0 %" if percent == 0 else f"{'+' if percent > 0 else '−'}{abs(percent)} %"


def difference(first: float, last: float) -> str:
    """Return ``last`` - ``first`` with its sign: +0.12, −0.08, ±0. For values that are logarithms already."""
    step = round(last - first, 2)
    return f"{'+' if step > 0 else '−'}{short(abs(step))}" if step else "±0"


def cell_text(value: JsonValue) -> str:
    """Return a table's cell as text: numbers to three digits, lists with commas, yes and no."""
    return _text(value, short)


def byte_size(count: float) -> str:
    """Return ``count`` bytes as 512 B, 5.03 kB, 11.1 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{short(count)} {unit}"
        count /= 1000
    return f"{short(count)} GB"


def flatten(value: JsonValue, prefix: str = "") -> list[tuple[str, str]]:
    """Return nested JSON as rows of dotted name and value. Numbers keep ten digits; lists of lists end at 50 items."""
    if isinstance(value, Mapping):
        return [
            row for name, inner in value.items() for row in flatten(inner, f"{prefix}.{name}" if prefix else str(name))
        ]
    if isinstance(value, list | tuple) and any(isinstance(inner, Mapping | list | tuple) for inner in value):
        return [row for index, inner in enumerate(value[:50]) for row in flatten(inner, f"{prefix}.{index}")]
    return [(prefix, _text(value, "{:.10g}".format))] if prefix else []


def lookup(value: JsonValue, *names: str) -> JsonValue:
    """Return ``value[name][name]...``; None when a name is missing."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def is_numeric(value: JsonValue) -> bool:
    """Return whether a cell should be aligned to the right, like a number."""
    if isinstance(value, str):
        return bool(re.fullmatch(r"[-+−]?[\d,]*\.?\d+(e[-+]?\d+)?( ?[%sB]| ?[kMG]B)?", value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: JsonValue, number: Callable[[float], str]) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(_text(inner, number) for inner in value)
    return str(value)
