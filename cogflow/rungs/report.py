"""The ladder told: on the terminal, in metrics.jsonl, in W&B, in the report."""

from __future__ import annotations

from pathlib import Path

from cogflow.tracking.tracker import Tracker


def tell(tracker: Tracker, folder: Path, step: int = 0) -> None:
    """Work out the table and the findings of ``folder/ladder.json`` from its panels, write them back, and tell them.

    The table goes to the terminal and to W&B (``ladder/rungs``), numbers to ``metrics.jsonl`` at ``step`` (``ladder/rung2_blur``, ...).
    A finding that was not told before is an alert. Rank 0 only; elsewhere it does nothing.
    """
