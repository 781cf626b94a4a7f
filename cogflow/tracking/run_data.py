"""Read what a run folder holds for its report. Files that are missing, cut off or damaged are left out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from cogflow.errors import CogflowError
from cogflow.files.paths import contained
from cogflow.files.record_io import read_record
from cogflow.records.event_records import AlertEvent, ArtifactEvent, TableEvent
from cogflow.records.history_records import ReplacedRecord, RunLine, read_history
from cogflow.records.run_records import StageRecord
from cogflow.records.sample_records import SampleRecord, SamplesRecord
from cogflow.tracking.metrics_log import EVENTS, METRICS, read_events, read_metrics
from cogflow.tracking.wandb_folders import sync_command

ORDER = ("pretrain", "prepare", "train", "sample", "export", "assemble", "diagnose", "benchmark", "flow")
"""Stages in the order that the report lists them."""


@dataclass(frozen=True)
class Points:
    """A named curve: ``values[i]`` at ``steps[i]``, steps rising; None where the value was not finite."""

    name: str
    steps: list[int]
    values: list[float | None]

    @property
    def finite(self) -> list[tuple[int, float]]:
        """The points with a finite value, as (step, value)."""
        return [(step, value) for step, value in zip(self.steps, self.values, strict=True) if value is not None]

    def __bool__(self) -> bool:
        return bool(self.finite)


@dataclass(frozen=True)
class ValidationSample:
    """One sample of a validation. ``video``: None when the file is missing. ``sharpness``: finite metrics by name."""

    id: str
    text: str
    seed: int
    video: Path | None
    sharpness: dict[str, float]

    @property
    def key(self) -> tuple[str, int]:
        """(prompt id, seed): the same in every validation of a run."""
        return self.id, self.seed


@dataclass(frozen=True)
class ValidationFolder:
    """One ``samples/step-*`` folder. ``sheet``: its contact sheet; None when the file is missing."""

    step: int
    folder: Path
    record: SamplesRecord
    samples: dict[tuple[str, int], ValidationSample]
    sheet: Path | None


@dataclass(frozen=True)
class ReplacedLine:
    """A former line of the run. ``next``: the line that replaced it. ``record``: what was moved aside, where known."""

    next: RunLine
    record: ReplacedRecord | None


@dataclass(frozen=True)
class RunData:
    """Content of a run folder: that of the current line of its history.

    ``records``: in the order that the stages run. ``validations``: by step. ``tables``: the newest of each key.
    ``last_step``: the last step that training logged; None before the first. ``line``: the current line; None where the
    run has no ``history.json``. ``replaced``: the former lines, oldest first. ``sync_command``: uploads what W&B wrote
    offline; empty when there is nothing to upload.
    """

    folder: Path
    records: list[StageRecord] = field(default_factory=list)
    metrics: dict[str, Points] = field(default_factory=dict)
    last_step: int | None = None
    validations: list[ValidationFolder] = field(default_factory=list)
    tables: dict[str, TableEvent] = field(default_factory=dict)
    alerts: list[AlertEvent] = field(default_factory=list)
    artifacts: list[ArtifactEvent] = field(default_factory=list)
    line: RunLine | None = None
    replaced: list[ReplacedLine] = field(default_factory=list)
    sync_command: str = ""

    def record(self, stage: str) -> StageRecord | None:
        """Return the record of ``stage``; None when the stage has not run."""
        return next((record for record in self.records if record.stage == stage), None)

    def curve(self, name: str) -> Points:
        """Return the curve of a metric; an empty one when it was never logged."""
        return self.metrics.get(name, Points(name, [], []))


def read_run(folder: Path) -> RunData:
    """Read the run folder ``folder``."""
    metrics, last_step = _read_curves(folder / METRICS)
    tables: dict[str, TableEvent] = {}
    alerts: list[AlertEvent] = []
    artifacts: dict[str, ArtifactEvent] = {}
    for event in read_events(folder / EVENTS):
        if isinstance(event, TableEvent):
            tables[event.key] = event
        elif isinstance(event, AlertEvent):
            alerts.append(event)
        elif isinstance(event, ArtifactEvent):
            artifacts.pop(event.name, None)
            artifacts[event.name] = event
    lines = _read_lines(folder)
    return RunData(
        folder=folder,
        records=_read_stage_records(folder),
        metrics=metrics,
        last_step=last_step,
        validations=_read_validations(folder / "samples"),
        tables=tables,
        alerts=alerts,
        artifacts=list(artifacts.values()),
        line=lines[-1] if lines else None,
        replaced=[ReplacedLine(line, _read_replaced(folder, line)) for line in lines[1:]],
        sync_command=sync_command(folder),
    )


def _read_lines(folder: Path) -> list[RunLine]:
    """Return the lines of the run's history; none where it has no history, or one that cannot be read."""
    try:
        lines = read_history(folder).lines
    except CogflowError:
        return []
    return lines if len(lines) > 1 or lines[0].began else []


def _read_replaced(folder: Path, line: RunLine) -> ReplacedRecord | None:
    try:
        return read_record(contained(folder, line.replaced or "") / ReplacedRecord.file_name, ReplacedRecord)
    except CogflowError:
        return None


def _read_stage_records(folder: Path) -> list[StageRecord]:
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = read_record(path, StageRecord)
        except CogflowError:
            continue
        if record.stage == path.stem:
            found.append(record)
    place = {stage: index for index, stage in enumerate(ORDER)}
    return sorted(found, key=lambda record: (place.get(record.stage, len(place) - 1.5), record.stage))


def _read_curves(path: Path) -> tuple[dict[str, Points], int | None]:
    """Return curves by name, and training's last step.

    Where a resumed run logged a step twice, the newer value counts.
    """
    values: dict[str, dict[int, float | None]] = {}
    last_step: int | None = None
    for line in read_metrics(path):
        for name, value in line.values.items():
            if isinstance(value, bool):
                continue
            finite = value is not None and math.isfinite(value)
            values.setdefault(name, {})[line.step] = float(value) if finite and value is not None else None
            if name.startswith("train/"):
                last_step = line.step if last_step is None else max(last_step, line.step)
    curves = {name: Points(name, sorted(at), [at[step] for step in sorted(at)]) for name, at in values.items()}
    return curves, last_step


def _read_validations(folder: Path) -> list[ValidationFolder]:
    found = []
    for path in folder.glob(f"*/{SamplesRecord.file_name}"):
        if path.parent.name.startswith("."):  # a folder that is being written
            continue
        try:
            record = read_record(path, SamplesRecord)
        except CogflowError:
            continue
        if record.step is None:
            continue
        samples = [_read_sample(path.parent, sample) for sample in record.samples]
        sheet = path.parent / "contact.png"
        found.append(
            ValidationFolder(
                step=record.step,
                folder=path.parent,
                record=record,
                samples={sample.key: sample for sample in samples},
                sheet=sheet if sheet.is_file() else None,
            )
        )
    return sorted(found, key=lambda validation: validation.step)


def _read_sample(folder: Path, sample: SampleRecord) -> ValidationSample:
    video = folder / Path(sample.video).name  # the name alone: a record never names a file outside its folder
    return ValidationSample(
        id=sample.id,
        text=sample.text,
        seed=sample.seed,
        video=video if sample.video and video.is_file() else None,
        sharpness={name: value for name, value in sample.sharpness.items() if math.isfinite(value)},
    )
