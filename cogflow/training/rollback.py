"""Rollbacks: return to an earlier checkpoint, set aside the later results, and continue with another learning rate.

``<run>/rollback.json`` lists the rollbacks of a run. The learning rate of a step is a function of that list and of the
step, so a resumed run trains exactly as one that never stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cogflow.artifacts.run_layout import step_folders, step_of
from cogflow.config.train_settings import RollbackConfig
from cogflow.files.record_io import read_record, write_record
from cogflow.records.training_records import RollbackEntry, RollbackRecord, TrainerRecord
from cogflow.tracking.metrics_log import EVENTS, METRICS, read_metrics, write_metrics

SET_ASIDE = "rolled-back"
"""Folder of a run with what rollbacks set aside."""


@dataclass(frozen=True)
class StartPoint:
    """Start of a training. ``checkpoint``: a verified folder and its record, both ``None`` for a new run.

    ``rollbacks``: those in force.
    """

    checkpoint: Path | None
    record: TrainerRecord | None
    rollbacks: Sequence[RollbackEntry]


class RollbackRequested(Exception):
    """Not an error: training must resume from ``start``."""

    def __init__(self, start: StartPoint) -> None:
        super().__init__(str(start.checkpoint))
        self.start = start


def rate_factor(rollbacks: Sequence[RollbackEntry], step: int) -> float:
    """Return the factor of the learning rate of step ``step`` (from 0)."""
    factor = 1.0
    for rollback in rollbacks:
        if step >= rollback.to:
            factor *= rollback.learning_rate_ratio
    return factor


def refusal(settings: RollbackConfig, rollbacks: Sequence[RollbackEntry]) -> str | None:
    """Return why a run with these ``rollbacks`` must stop instead of continuing after one more, or ``None``."""
    if settings.learning_rate_ratio == 1.0:
        return "no other settings are given, and the same settings would repeat the same run"
    if len(rollbacks) >= settings.most:
        return f"it rolled back {len(rollbacks)} times already, and stage.rollback.most={settings.most}"
    return None


def read_rollbacks(folder: Path) -> list[RollbackEntry]:
    """Return the rollbacks of the run in ``folder`` in their order.

    Raises :class:`CheckpointError` for a file that cannot be read.
    """
    path = folder / RollbackRecord.file_name
    return read_record(path, RollbackRecord).rollbacks if path.is_file() else []


def write_rollbacks(folder: Path, rollbacks: Sequence[RollbackEntry]) -> None:
    """Write ``rollback.json`` of the run in ``folder``."""
    write_record(folder / RollbackRecord.file_name, RollbackRecord(list(rollbacks)))


def roll_back(folder: Path, start: int, to: int, ratio: float, reason: str) -> list[RollbackEntry]:
    """Record a rollback and set aside the results after ``to``; return all rollbacks. Rank 0 only.

    The record comes first: after a kill at any moment :func:`finish_rollback` completes it.
    """
    rollbacks = read_rollbacks(folder)
    write_rollbacks(folder, [*rollbacks, RollbackEntry(len(rollbacks) + 1, start, to, ratio, reason)])
    return finish_rollback(folder)


def finish_rollback(folder: Path) -> list[RollbackEntry]:
    """Set aside what the last recorded rollback still has to; return all rollbacks. Rank 0 only."""
    rollbacks = read_rollbacks(folder)
    if rollbacks and not rollbacks[-1].moved:
        last = rollbacks[-1]
        set_aside(folder, folder / SET_ASIDE / f"{last.number:02d}", last.to)
        rollbacks[-1] = replace(last, moved=True)
        write_rollbacks(folder, rollbacks)
    return rollbacks


def forget_rollbacks(folder: Path) -> None:
    """Move the record of rollbacks to what was set aside: they do not apply to a run that starts from nothing.

    Rank 0 only.
    """
    path = folder / RollbackRecord.file_name
    if path.is_file():
        number = len(list((folder / SET_ASIDE).glob("*.json"))) + 1
        target = folder / SET_ASIDE / f"{path.stem}-{number}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def set_last_ratio(folder: Path, ratio: float) -> list[RollbackEntry]:
    """Set the learning rate ratio of the last rollback, after which the run had stopped; return all rollbacks.

    Rank 0 only.
    """
    rollbacks = read_rollbacks(folder)
    rollbacks[-1] = replace(rollbacks[-1], learning_rate_ratio=ratio)
    write_rollbacks(folder, rollbacks)
    return rollbacks


def set_aside(folder: Path, target: Path, step: int) -> None:
    """Move checkpoints and samples after ``step`` to ``target``, and copy the metrics that will be rewound."""
    target.mkdir(parents=True, exist_ok=True)
    lines = [line for line in read_metrics(folder / METRICS) if line.is_training and line.step > step]
    if lines:
        write_metrics(target / METRICS, lines)
    if (folder / EVENTS).is_file():
        shutil.copyfile(folder / EVENTS, target / EVENTS)
    for kind in ("checkpoints", "samples"):
        for path in step_folders(folder / kind):
            if step_of(path) > step:
                (target / kind).mkdir(exist_ok=True)
                path.rename(target / kind / path.name)
