"""What lies in a run folder, read leniently: whatever is missing, torn or of another shape is left out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogflow.tracking.metrics_log import EVENTS, read_lines

ORDER = ("prepare", "train", "sample", "export", "assemble", "diagnose", "benchmark", "flow")


@dataclass(frozen=True)
class Points:
    """A named curve: ``values[i]`` at ``steps[i]``, steps rising; ``None`` where the value was not finite."""

    name: str
    steps: list[int]
    values: list[float | None]

    @property
    def finite(self) -> list[tuple[int, float]]:
        return [(step, value) for step, value in zip(self.steps, self.values, strict=True) if value is not None]

    def __bool__(self) -> bool:
        return bool(self.finite)


@dataclass(frozen=True)
class Sample:
    id: str
    text: str
    seed: int
    video: Path | None  # None: the file is not there
    sharpness: dict[str, float]

    @property
    def key(self) -> tuple[str, int]:
        return self.id, self.seed


@dataclass(frozen=True)
class Validation:
    """One ``samples/step-*`` folder."""

    step: int
    folder: Path
    width: int
    height: int
    samples: dict[tuple[str, int], Sample]
    sheet: Path | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class RunData:
    folder: Path
    records: list[dict[str, Any]]  # <stage>.json in the order the stages run
    metrics: dict[str, Points]
    last_step: int | None
    validations: list[Validation]  # by step
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)

    def record(self, stage: str) -> dict[str, Any] | None:
        return next((record for record in self.records if record["stage"] == stage), None)

    def curve(self, name: str) -> Points:
        return self.metrics.get(name, Points(name, [], []))


def read_run(folder: Path) -> RunData:
    metrics, last = _metrics(folder / "metrics.jsonl")
    tables: dict[str, dict[str, Any]] = {}
    alerts: list[dict[str, Any]] = []
    artifacts: dict[str, dict[str, Any]] = {}
    for event in read_lines(folder / EVENTS):
        kind = event.get("kind")
        if kind == "table" and isinstance(event.get("rows"), list) and isinstance(event.get("columns"), list):
            tables[str(event.get("key"))] = event
        elif kind == "alert":
            alerts.append(event)
        elif kind == "artifact" and "name" in event:
            artifacts.pop(event["name"], None)
            artifacts[event["name"]] = event
    return RunData(
        folder=folder,
        records=_records(folder),
        metrics=metrics,
        last_step=last,
        validations=_validations(folder / "samples"),
        tables=tables,
        alerts=alerts,
        artifacts=list(artifacts.values()),
    )


def read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _records(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("*.json")):
        record = read_object(path)
        if record and record.get("stage") == path.stem and isinstance(record.get("results"), dict):
            found.append(record)
    place = {stage: index for index, stage in enumerate(ORDER)}
    return sorted(found, key=lambda record: (place.get(record["stage"], len(place) - 1.5), record["stage"]))


def _metrics(path: Path) -> tuple[dict[str, Points], int | None]:
    """Curves by name. Where a step was logged twice (a resumed run), the newer value stands."""
    values: dict[str, dict[int, float | None]] = {}
    last = None
    for line in read_lines(path):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        for name, value in line.items():
            if (
                name in ("step", "time")
                or isinstance(value, bool)
                or not (value is None or isinstance(value, int | float))
            ):
                continue
            finite = value is not None and math.isfinite(value)
            values.setdefault(name, {})[step] = float(value) if finite and value is not None else None
            if name.startswith("train/"):
                last = step if last is None else max(last, step)
    return {name: Points(name, sorted(at), [at[step] for step in sorted(at)]) for name, at in values.items()}, last


def _validations(folder: Path) -> list[Validation]:
    found = []
    for path in folder.glob("*/samples.json"):
        if path.parent.name.startswith("."):  # a folder that is being written
            continue
        facts = read_object(path)
        if not facts or not isinstance(facts.get("step"), int) or not isinstance(facts.get("samples"), list):
            continue
        samples = [_sample(path.parent, entry) for entry in facts["samples"] if isinstance(entry, dict)]
        sheet = path.parent / "contact.png"
        found.append(
            Validation(
                step=facts["step"],
                folder=path.parent,
                width=int(facts.get("width") or 0),
                height=int(facts.get("height") or 0),
                samples={sample.key: sample for sample in samples},
                sheet=sheet if sheet.is_file() else None,
                facts={name: value for name, value in facts.items() if name != "samples"},
            )
        )
    return sorted(found, key=lambda validation: validation.step)


def _sample(folder: Path, entry: dict[str, Any]) -> Sample:
    name = str(entry.get("video") or "")
    video = folder / Path(name).name if name else None  # the name alone: a record never leads out of its folder
    sharpness = entry.get("sharpness")
    return Sample(
        id=str(entry.get("id", "")),
        text=str(entry.get("text", "")),
        seed=int(entry.get("seed") or 0),
        video=video if video and video.is_file() else None,
        sharpness={
            name: float(value)
            for name, value in (sharpness.items() if isinstance(sharpness, dict) else ())
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        },
    )
