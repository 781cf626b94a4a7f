"""Begin a new line of a run's history: move the later results of the former line aside, and bring back an older line.

:mod:`cogflow.records.history_records` explains lines. The record is written before anything moves, so that
:func:`finish_line` completes what a kill interrupted. Nothing is deleted. Every function works on rank 0 only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cogflow.artifacts.run_layout import RunLayout, parse_step, step_folders, step_name, step_of
from cogflow.errors import CogflowError
from cogflow.files.atomic_write import storage_errors
from cogflow.files.bounded_parsing import parse_json
from cogflow.files.linking import link_folder
from cogflow.files.paths import contained
from cogflow.files.publish import files_below
from cogflow.files.record_io import ForeignObject, JsonValue, read_record, write_record
from cogflow.records.history_records import REPLACED, HistoryRecord, ReplacedRecord, RunLine, read_history
from cogflow.records.ladder_records import LadderRecord, LadderRungs
from cogflow.records.training_records import LatestCheckpoint
from cogflow.tracking.metrics_log import EVENTS, METRICS, TRAINING, read_metrics, split_lines, write_lines

STEP_FOLDERS = ("checkpoints", "weights", "samples")
"""Folders of a run with one folder for each step."""
TRAIN = "train"
"""Name of the stage whose results belong to a line."""


@dataclass(frozen=True)
class CutOff:
    """Results that were moved aside: those of steps after ``kept``, in ``folder``."""

    folder: Path
    kept: int


@dataclass(frozen=True)
class Interval:
    """Results of the steps ``low < step <= high``, in ``folder``."""

    folder: Path
    low: int
    high: int

    def __contains__(self, step: int) -> bool:
        return self.low < step <= self.high


def point_at(path: Path) -> None:
    """Make ``latest.json`` name the verified checkpoint ``path``."""
    size = sum((path / name).stat().st_size for name in files_below(path))
    write_record(path.parent / LatestCheckpoint.file_name, LatestCheckpoint(step_of(path), path.name, size))


def has_results(folder: Path, kept: int = -1) -> bool:
    """Return whether the run in ``folder`` has results of training at steps after ``kept``."""
    if any(step_of(path) > kept for kind in STEP_FOLDERS for path in step_folders(folder / kind)):
        return True
    return any(line.is_training and line.step > kept for line in read_metrics(folder / METRICS))


def begin_line(folder: Path, line: RunLine) -> RunLine:
    """Begin ``line`` in the run in ``folder`` and move what it replaces; return it with the folder of that.

    The fields ``number``, ``replaced``, ``moved`` and ``restored`` are set here. The pointer to the newest checkpoint
    is set first, so that it never names a checkpoint of another line. Raises :class:`StorageError`.
    """
    history = read_history(folder)
    lines = history.lines
    if len(lines) == 1 and not lines[0].began and not has_results(folder):
        lines = []  # the run has no results: this is its first line
    elif has_results(folder, line.kept) or (folder / f"{TRAIN}.json").is_file():
        line = replace(line, replaced=f"{REPLACED}/{_next_number(folder):02d}")
    line = replace(line, number=len(lines) + 1, moved=False, restored=False)
    with storage_errors(folder):
        _reset_pointer(folder, line)
        _write(folder, [*lines, line])
        return finish_line(folder)


def finish_line(folder: Path) -> RunLine:
    """Complete the moves of the current line, which a kill may have interrupted; return the line."""
    history = read_history(folder)
    line = history.current
    with storage_errors(folder):
        if not line.moved:
            _reset_pointer(folder, line)
            if line.replaced is not None:
                _move_results(folder, contained(folder, line.replaced), line)
            line = replace(line, moved=True)
            _write(folder, [*history.lines[:-1], line])
        if not line.restored:
            intervals = restored_intervals(history, folder, line.checkpoint, line.from_step)
            for interval in intervals:
                _restore(folder, interval)
            if intervals:
                point_at(RunLayout(folder).checkpoints / step_name(line.from_step))
            line = replace(line, restored=True)
            _write(folder, [*history.lines[:-1], line])
    return line


def _write(folder: Path, lines: list[RunLine]) -> None:
    write_record(folder / HistoryRecord.file_name, HistoryRecord(lines))


def restored_intervals(history: HistoryRecord, folder: Path, checkpoint: str | None, step: int) -> list[Interval]:
    """Return where the results up to ``step`` of the line of ``checkpoint`` are, if it was moved aside; else none.

    ``checkpoint``: relative to the run. The steps that no interval contains are still in the folders of the run.
    """
    cuts = [CutOff(contained(folder, line.replaced), line.kept) for line in history.lines if line.replaced]
    home = next((cut for cut in cuts if checkpoint and (folder / checkpoint).is_relative_to(cut.folder)), None)
    if home is None:
        return []
    found = [Interval(home.folder, home.kept, step)]
    for cut in cuts[cuts.index(home) + 1 :]:
        # What the older line kept was moved aside by the first later cut below it.
        if cut.kept < found[-1].low:
            found.append(Interval(cut.folder, cut.kept, found[-1].low))
    return found


def _next_number(folder: Path) -> int:
    numbers = [int(path.name) for path in (folder / REPLACED).glob("*") if path.name.isdecimal()]
    return max(numbers, default=0) + 1


def _reset_pointer(folder: Path, line: RunLine) -> None:
    """Make ``latest.json`` name the checkpoint that ``line`` starts from, if it is one of the run; else remove it."""
    checkpoints = RunLayout(folder).checkpoints
    own = [path for path in step_folders(checkpoints) if step_of(path) == line.from_step <= line.kept]
    if own:
        point_at(own[0])
    else:
        (checkpoints / LatestCheckpoint.file_name).unlink(missing_ok=True)


def _move_results(folder: Path, target: Path, line: RunLine) -> None:
    """Move what training made after step ``line.kept`` to ``target``. It may have been moved in part already."""
    target.mkdir(parents=True, exist_ok=True)
    kept = line.kept
    for kind in STEP_FOLDERS:
        for path in step_folders(folder / kind):
            if step_of(path) > kept:
                _move(path, target / kind / path.name)
    for sheet in sorted(RunLayout(folder).watch.glob("*.png")):
        if (step := parse_step(sheet.stem)) is not None and step > kept:
            _move(sheet, target / "watch" / sheet.name)
    # The time of the last step that stays tells which events without a step belong to later steps.
    rows = [row for row in read_metrics(folder / METRICS) if row.is_training and row.step <= kept]
    last_time = max((row.time for row in rows), default=-math.inf)
    _move_lines(folder / EVENTS, target / EVENTS, lambda event: _is_later_event(event, kept, last_time))
    _move_lines(folder / METRICS, target / METRICS, lambda row: _is_later_row(row, kept))
    _move_rungs(folder, target, kept)
    if (record := folder / f"{TRAIN}.json").is_file():
        _move(record, target / record.name)
    write_record(
        target / ReplacedRecord.file_name,
        ReplacedRecord(
            line=line.number - 1,
            after=kept,
            moved_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            reason=line.reason,
            command=line.command,
            next_line=line.number,
            checkpoints=[step_of(path) for path in step_folders(target / "checkpoints")],
            samples=[step_of(path) for path in step_folders(target / "samples")],
            metric_rows=len(read_metrics(target / METRICS)),
        ),
    )


def _move(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)


def _move_lines(path: Path, target: Path, moves: Callable[[ForeignObject], bool]) -> None:
    """Move the lines of a JSON lines file for which ``moves`` returns true. A kill in between leaves them in both."""
    moved, stays = split_lines(path, moves)
    if moved:
        already = split_lines(target, lambda _: True)[0]
        write_lines(target, already + [line for line in moved if line not in already])
        write_lines(path, stays)


def _is_later_row(row: ForeignObject, kept: int) -> bool:
    step = row.get("step")
    return isinstance(step, int) and step > kept and any(name.startswith(TRAINING) for name in row)


def _is_later_event(event: ForeignObject, kept: int, last_time: float) -> bool:
    if event.get("stage") != TRAIN:
        return False
    step, moment = event.get("step"), event.get("time")
    if isinstance(step, int):
        return step > kept
    return isinstance(moment, int | float) and moment > last_time


def _move_rungs(folder: Path, target: Path, kept: int) -> None:
    """Copy ``ladder.json`` to ``target``, and remove the rungs of later steps from the run's own."""
    path = folder / LadderRecord.file_name
    if not path.is_file():
        return
    try:
        ladder = read_record(path, LadderRecord)
    except CogflowError:
        _move(path, target / path.name)
        return
    rungs = ladder.rungs
    former = {"base": rungs.base, "tuned": rungs.tuned, "exported": rungs.exported}
    later = [name for name, rung in former.items() if rung is not None and _step(name, rung.step) > kept]
    if not later:
        return
    write_record(target / path.name, ladder)
    numbers = {RUNG_NUMBERS[name] for name in later}
    write_record(
        path,
        LadderRecord(
            rungs=replace(rungs, **dict.fromkeys(later)),
            findings=[finding for finding in ladder.findings if finding.rung not in numbers],
            table=[row for row in ladder.table if not numbers & {row.rung, row.against}],
        ),
    )


RUNG_NUMBERS = {"base": 3, "tuned": 4, "exported": 5}


def _step(name: str, step: int | None) -> int:
    """Return the step of a rung; rungs of older versions may not state it."""
    return step if step is not None else 0 if name == "base" else 1 << 62


def _restore(folder: Path, interval: Interval) -> None:
    """Bring the results of ``interval`` back into the folders of the run. They stay in its folder, too."""
    for kind in STEP_FOLDERS:
        for path in step_folders(interval.folder / kind):
            if step_of(path) in interval and not (folder / kind / path.name).exists():
                link_folder(path, folder / kind / path.name)
    rows = [row for row in read_metrics(interval.folder / METRICS) if row.step in interval]
    last = max((row.time for row in rows), default=-math.inf)
    _restore_lines(folder / METRICS, interval.folder / METRICS, lambda row: _in(interval, row.get("step")))
    _restore_lines(
        folder / EVENTS,
        interval.folder / EVENTS,
        lambda event: _in(interval, event["step"]) if "step" in event else _time(event) <= last,
    )
    _restore_rungs(folder, interval)


def _in(interval: Interval, step: JsonValue) -> bool:
    return isinstance(step, int) and step in interval


def _time(value: ForeignObject) -> float:
    moment = value.get("time")
    return float(moment) if isinstance(moment, int | float) else 0.0


def _restore_lines(path: Path, source: Path, wanted: Callable[[ForeignObject], bool]) -> None:
    """Add the ``wanted`` lines of ``source`` to ``path``, in the order of their times."""
    present = split_lines(path, lambda _: True)[0]
    added = [line for line in split_lines(source, wanted)[0] if line not in present]
    if added:
        write_lines(path, sorted([*present, *added], key=lambda line: _time(parse_json(line))))


def _restore_rungs(folder: Path, interval: Interval) -> None:
    """Bring back the rungs of samples that the run's ladder lacks."""
    source, path = interval.folder / LadderRecord.file_name, folder / LadderRecord.file_name
    if not (source.is_file() and path.is_file()):
        return
    ladder, former = read_record(path, LadderRecord), read_record(source, LadderRecord)
    found = {
        name: rung
        for name in RUNG_NUMBERS
        if getattr(ladder.rungs, name) is None
        and (rung := getattr(former.rungs, name)) is not None
        and _step(name, rung.step) in interval
    }
    if found:
        rungs: LadderRungs = replace(ladder.rungs, **found)
        write_record(path, replace(ladder, rungs=rungs))
