"""Rollbacks: return to an earlier checkpoint and continue with another learning rate, as a new line of the run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cogflow.artifacts.run_history import begin_line
from cogflow.artifacts.run_layout import step_folders
from cogflow.config.config import Config
from cogflow.config.train_settings import RollbackConfig, TrainStage
from cogflow.files.record_io import JsonObject, write_record
from cogflow.files.secrets import scrub, scrub_text
from cogflow.records.history_records import HistoryRecord, RollbackEntry, RunLine, read_history
from cogflow.records.training_records import TrainerRecord
from cogflow.runtime.console import echo
from cogflow.tracking.stage_record import command_line, to_json_object

PLACE_SECTIONS = ("run", "tracking")
"""Sections of the config that say where results go and not how they are made."""


@dataclass(frozen=True)
class StartPoint:
    """Start of a training. ``checkpoint``: a verified folder and its record, both ``None`` for a start from the model.

    ``rollbacks``: those in force. ``line``: the line that begins here; ``None`` when the current line goes on.
    """

    checkpoint: Path | None
    record: TrainerRecord | None
    rollbacks: Sequence[RollbackEntry]
    line: RunLine | None = None


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


def line_settings(config: Config[TrainStage]) -> JsonObject:
    """Return the settings that decide what a training does, by section."""
    values = asdict(config)
    values["stage"].pop("changed_data")  # it lets a training go on, and does not change it
    settings = scrub(to_json_object(values))
    return {name: value for name, value in settings.items() if name not in PLACE_SECTIONS}


def new_line(
    config: Config[TrainStage],
    reason: str,
    *,
    from_step: int = 0,
    checkpoint: str | None = None,
    kept: int = -1,
    rollbacks: Sequence[RollbackEntry] = (),
) -> RunLine:
    """Return a line that this command begins. See :class:`RunLine`; the number is set when it begins."""
    return RunLine(
        number=0,
        began=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        reason=reason,
        command=scrub_text(command_line()),
        settings=line_settings(config),
        from_step=from_step,
        checkpoint=checkpoint,
        kept=kept,
        rollbacks=list(rollbacks),
    )


def begin(folder: Path, line: RunLine) -> RunLine:
    """Begin ``line`` in the run in ``folder`` and report what was moved aside. Rank 0 only."""
    begun = begin_line(folder, line)
    if begun.number > 1:
        echo(f"line {begun.number} of this run begins after step {begun.from_step} ({begun.reason})")
    if begun.replaced is not None:
        aside = folder / begun.replaced
        later = f"after step {begun.kept}" if begun.kept >= 0 else "before"
        echo(f"the results that the run had {later} are kept in {aside}")
        checkpoints = step_folders(aside / "checkpoints")
        if checkpoints:
            echo(f"to continue them instead, run the command with stage.resume={checkpoints[-1]}")
    return begun


def set_last_ratio(folder: Path, ratio: float) -> list[RollbackEntry]:
    """Set the learning rate ratio of the last rollback, after which the run had stopped; return all in force.

    Rank 0 only.
    """
    history = read_history(folder)
    line = history.current
    rollbacks = [*line.rollbacks[:-1], replace(line.rollbacks[-1], learning_rate_ratio=ratio)]
    lines = [*history.lines[:-1], replace(line, rollbacks=rollbacks)]
    write_record(folder / HistoryRecord.file_name, HistoryRecord(lines))
    return rollbacks
