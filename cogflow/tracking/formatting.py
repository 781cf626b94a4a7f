"""Values as people read them, and careful looks into JSON that may be anything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cogflow.tracking.curves import short


def change(first: float, last: float) -> str:
    """How far ``last`` is from ``first``: +12 %, −8 %, ±0 %; empty when ``first`` is zero."""
    if not first:
        return ""
    percent = round(100 * (last / first - 1))
    return "±0 %" if percent == 0 else f"{'+' if percent > 0 else '−'}{abs(percent)} %"


def difference(first: float, last: float) -> str:
    """``last`` - ``first`` with its sign: +0.12, −0.08, ±0. For values that are logarithms already."""
    step = round(last - first, 2)
    return f"{'+' if step > 0 else '−'}{short(abs(step))}" if step else "±0"


def text(value: Any) -> str:
    """A cell of a table: numbers to three digits, lists with commas, yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return short(value)
    if isinstance(value, list):
        return ", ".join(text(inner) for inner in value)
    return "" if value is None else str(value)


def size(count: Any) -> str:
    """``count`` bytes as 512 B, 5.03 kB, 11.1 GB; empty when it is no number."""
    if not is_number(count):
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{short(count)} {unit}"
        count /= 1000
    return f"{short(count)} GB"


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted name, value) rows; numbers keep their digits."""
    if isinstance(value, Mapping):
        return [
            row for name, inner in value.items() for row in flat(inner, f"{prefix}.{name}" if prefix else str(name))
        ]
    if isinstance(value, list) and any(isinstance(inner, Mapping | list) for inner in value):
        return [row for index, inner in enumerate(value[:50]) for row in flat(inner, f"{prefix}.{index}")]
    if not prefix:
        return []
    if isinstance(value, list):
        return [(prefix, ", ".join(_exact(inner) for inner in value))]
    return [(prefix, _exact(value))]


def dig(value: Any, *names: str) -> Any:
    """``value[name][name]...``, or ``None`` as soon as something is not there."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def looks_like_number(value: Any) -> bool:
    """Whether a cell should stand to the right, with its digits below those of its column."""
    if isinstance(value, str):
        return bool(re.fullmatch(r"[-+−]?[\d,]*\.?\d+(e[-+]?\d+)?( ?[%sB]| ?[kMG]B)?", value))
    return is_number(value)


def seconds(record: Mapping[str, Any]) -> float:
    return float(record["seconds"]) if is_number(record.get("seconds")) else 0.0


def _exact(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else text(value)
