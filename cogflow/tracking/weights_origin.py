"""Describe which training step of which run exported weights are from, and whether that part was replaced since."""

from __future__ import annotations

from pathlib import Path

from cogflow.errors import UserError
from cogflow.records.history_records import read_history


def describe_origin(run: str | None, line: int | None, step: int | None) -> str:
    """Return words such as "from step 12 of line 2 of RUN"; empty where the step is unknown.

    ``run``: a name or a path.
    """
    if step is None:
        return ""
    parts = [f"from step {step}", f"line {line}" if line is not None else "", run or ""]
    return " of ".join(part for part in parts if part)


def replaced_note(run: Path, line: int | None, step: int | None) -> str:
    """Return words for weights of a step that the folders of ``run`` no longer contain; empty where they do."""
    if line is None or step is None:
        return ""
    try:
        replaced = read_history(run).replaced_in(line, step)
    except UserError:
        return ""
    return f"exported from a line that was replaced ({replaced})" if replaced else ""
