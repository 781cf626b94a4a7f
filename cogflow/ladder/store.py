"""``<run>/ladder.json``: one file for all rungs, written by whichever stage measured one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogflow.files.atomic_write import write_json

FILE = "ladder.json"
MOST = 256  # panels kept of a rung, evenly spread; more clips do not narrow an interval that matters


def read(folder: Path) -> dict[str, Any]:
    """The ladder of the run in ``folder``; an empty one where there is none, or one that cannot be read."""
    try:
        ladder = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return ladder if isinstance(ladder["rungs"], dict) else empty()
    except (OSError, ValueError, KeyError, TypeError):
        return empty()


def empty() -> dict[str, Any]:
    return {"rungs": {}, "variants": {}, "findings": [], "table": []}


def put(
    folder: Path, rung: int, panels: Mapping[str, Mapping[str, float]], facts: Mapping[str, Any], **other: Any
) -> None:
    """Write one rung: ``panels`` by clip or sample, and ``facts``. ``variants`` of that rung may come beside them."""
    ladder = read(folder)
    names = list(panels)
    if len(names) > MOST:
        names = [names[round(index * (len(names) - 1) / (MOST - 1))] for index in range(MOST)]
    ladder["rungs"][str(rung)] = {"panels": {name: dict(panels[name]) for name in names}, "facts": dict(facts)}
    for key, value in other.items():
        ladder.setdefault(key, {})[str(rung)] = value
    save(folder, ladder)


def note(folder: Path, rung: int, **facts: Any) -> None:
    """Add ``facts`` to a rung, which may have no panels yet."""
    ladder = read(folder)
    ladder["rungs"].setdefault(str(rung), {"panels": {}, "facts": {}})["facts"].update(facts)
    save(folder, ladder)


def save(folder: Path, ladder: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, ladder)
