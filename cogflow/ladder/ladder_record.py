"""Read and write ``<run>/ladder.json``, the record of all rungs. Whichever stage measures a rung writes it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cogflow.errors import UserError
from cogflow.files.record_io import read_record, write_record
from cogflow.ladder.rung import Rung
from cogflow.records.ladder_records import (
    BaseRung,
    ClipRung,
    ExportedRung,
    LadderRecord,
    LadderRungs,
    RoundtripRung,
    SourceRung,
    TunedRung,
)

MOST_CLIPS = 256  # clips or samples kept of a rung, evenly spread; more do not narrow an interval by much
RungRecord = SourceRung | ClipRung | RoundtripRung | BaseRung | TunedRung | ExportedRung


def read_ladder(folder: Path) -> LadderRecord:
    """Return the ladder of the run in ``folder``; an empty one where there is none, or none that can be read."""
    try:
        return read_record(folder / LadderRecord.file_name, LadderRecord)
    except UserError:
        return LadderRecord()


def write_ladder(folder: Path, ladder: LadderRecord) -> None:
    """Write ``ladder.json`` into the run ``folder``, which is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / LadderRecord.file_name, ladder)


def write_rung(folder: Path, rung: Rung, record: RungRecord) -> None:
    """Write one rung, with at most :data:`MOST_CLIPS` of its clips or samples. The other rungs stay."""
    names = list(record.metrics)
    if len(names) > MOST_CLIPS:
        names = [names[round(index * (len(names) - 1) / (MOST_CLIPS - 1))] for index in range(MOST_CLIPS)]
        record = dataclasses.replace(record, metrics={name: record.metrics[name] for name in names})
    ladder = read_ladder(folder)
    rungs = {**vars(ladder.rungs), rung.title: record}
    write_ladder(folder, dataclasses.replace(ladder, rungs=LadderRungs(**rungs)))


def rung_record(ladder: LadderRecord, rung: Rung) -> RungRecord | None:
    """Return the record of ``rung``; ``None`` where it was not measured."""
    record: RungRecord | None = getattr(ladder.rungs, rung.title)
    return record
