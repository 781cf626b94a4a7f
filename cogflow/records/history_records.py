"""Files of a run's history: ``history.json``, and ``replaced.json`` beside results that were moved aside.

The history of a run is a list of lines. A line is what one training without interruption would have made. A run has one
line until a training starts below its end: anew, from an earlier checkpoint, or by a rollback. Then a new line begins,
and what the former line had after that step is moved to ``replaced/NN``. The folders of the run hold the last line
only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from cogflow.files.record_io import OMIT_NONE, JsonObject, Record, read_record

REPLACED = "replaced"
"""Folder of a run with one numbered folder for each line that was cut off."""


@dataclass(frozen=True)
class RollbackEntry:
    """One return to an earlier checkpoint.

    ``start``: the step after which the alarm came. ``to``: the step of the checkpoint that training continues from.
    ``learning_rate_ratio``: factor on the learning rate from there on, on top of earlier ones; 1 where the run stopped.
    """

    start: int
    to: int
    learning_rate_ratio: float
    reason: str


@dataclass(frozen=True)
class RunLine:
    """One line of a run's history.

    ``began``: UTC, ISO 8601. ``reason``: why it began, a clause. ``command``: the command that began it.
    ``settings``: that command's settings, by section. ``from_step``: the step that it starts from.
    ``checkpoint``: the checkpoint that it starts from, relative to the run where it is inside; None: the model.
    ``kept``: the last step of the former line whose results stay; -1 where none stay.
    ``rollbacks``: those in force. The learning rate of each step follows from them.
    ``replaced``: the folder with the results that were moved aside, relative to the run; None where there were none.
    ``moved``: False while results are being moved. ``restored``: False while those of an older line are brought back.
    """

    number: int
    began: str
    reason: str
    command: str
    settings: JsonObject
    from_step: int = 0
    checkpoint: Annotated[str | None, OMIT_NONE] = None
    kept: int = -1
    rollbacks: list[RollbackEntry] = field(default_factory=list)
    replaced: Annotated[str | None, OMIT_NONE] = None
    moved: bool = True
    restored: bool = True


@dataclass(frozen=True)
class HistoryRecord(Record):
    """``history.json``: the lines of a run, oldest first. The last one is the line that its folders hold."""

    file_name: ClassVar[str] = "history.json"
    advice: ClassVar[str] = "Restore the file from a copy. It says which checkpoints belong together."

    lines: list[RunLine]

    @property
    def current(self) -> RunLine:
        """The line that is trained now, or was trained last."""
        return self.lines[-1]

    def line(self, number: int) -> RunLine | None:
        """Return the line of this number, ``None`` where there is none."""
        return next((line for line in self.lines if line.number == number), None)

    def replaced_in(self, number: int, step: int) -> str | None:
        """Return the folder that the result of ``step`` on line ``number`` was moved to, relative to the run.

        ``None`` where the run still has that result.
        """
        if self._trained_on(step) == number:
            return None
        later = (line for line in self.lines if line.number > number)
        return next((line.replaced for line in later if line.kept < step and line.replaced), None)

    def _trained_on(self, step: int) -> int | None:
        """Return the line that trained the result of ``step`` in the folders of the run; ``None``: another run did."""
        line: RunLine | None = self.current
        while line is not None and step <= line.from_step:
            aside = [other.number - 1 for other in self.lines if _is_in(line.checkpoint, other.replaced)]
            if not aside and step > line.kept:
                return None
            line = self.line(aside[0] if aside else line.number - 1)
        return line.number if line is not None else 1


def _is_in(checkpoint: str | None, folder: str | None) -> bool:
    return checkpoint is not None and folder is not None and checkpoint.startswith(f"{folder}/")


@dataclass(frozen=True)
class ReplacedRecord(Record):
    """``replaced/NN/replaced.json``: what is in this folder, and when, why and by which command it was moved here.

    ``line``: the line that the results belong to. ``after``: results of later steps are here. ``next_line``: the line
    that replaced it. ``checkpoints`` and ``samples``: their steps. ``metric_rows``: number of lines of metrics.jsonl.
    """

    file_name: ClassVar[str] = "replaced.json"

    line: int
    after: int
    moved_at: str
    reason: str
    command: str
    next_line: int
    checkpoints: list[int]
    samples: list[int]
    metric_rows: int


@dataclass(frozen=True)
class FormerRollback:
    """An entry of ``rollback.json``."""

    number: int
    start: int
    to: int
    learning_rate_ratio: float
    reason: str
    moved: bool = False


@dataclass(frozen=True)
class FormerRollbacks(Record):
    """``rollback.json``: the rollbacks of a run, written by versions of cogflow before ``history.json``."""

    file_name: ClassVar[str] = "rollback.json"
    advice: ClassVar[str] = "It sets the learning rate; restore it, or start anew with stage.resume=never."

    rollbacks: list[FormerRollback]

    def lines(self) -> list[RunLine]:
        """Return the history that these rollbacks state."""
        lines = [_FIRST]
        for entry in self.rollbacks:
            rollback = RollbackEntry(entry.start, entry.to, entry.learning_rate_ratio, entry.reason)
            lines.append(
                RunLine(
                    number=len(lines) + 1,
                    began="",
                    reason=f"rollback after step {entry.start}: {entry.reason}",
                    command="",
                    settings={},
                    from_step=entry.to,
                    kept=entry.to,
                    rollbacks=[*lines[-1].rollbacks, rollback],
                    replaced=f"rolled-back/{entry.number:02d}",
                    moved=entry.moved,
                )
            )
        return lines


_FIRST = RunLine(1, "", "new run", "", {})


def read_history(folder: Path) -> HistoryRecord:
    """Return the history of the run in ``folder``; one line where it has no ``history.json``.

    Raises :class:`~cogflow.errors.CheckpointError` for a file that cannot be read.
    """
    path = folder / HistoryRecord.file_name
    if path.is_file():
        return read_record(path, HistoryRecord)
    former = folder / FormerRollbacks.file_name
    if former.is_file():
        return HistoryRecord(read_record(former, FormerRollbacks).lines())
    return HistoryRecord([_FIRST])


def current_line(folder: Path) -> int:
    """Return the number of the line that the folders of the run in ``folder`` hold."""
    return read_history(folder).current.number
