"""Write and read ``metrics.jsonl`` and ``events.jsonl``: one JSON object a line, complete also after a kill."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsFloat, TypeAlias

from cogflow.errors import CogflowError
from cogflow.files.atomic_write import storage_errors, write_text
from cogflow.files.bounded_parsing import parse_json
from cogflow.files.contained_files import open_to_append, read_regular
from cogflow.files.record_io import JsonObject, JsonValue, parse_record, record_values
from cogflow.records.event_records import EVENT_KINDS, Event

METRICS = "metrics.jsonl"
"""Scalars by step."""

EVENTS = "events.jsonl"
"""What is not a scalar: videos, images, tables, artifacts and alerts, with their ``kind``."""

TRAINING = ("train/", "heldout/", "ema/", "spectrum/", "sharpness/", "watch/", "validation/", "checkpoint/")
"""Prefixes of names that belong to a step of training. On resume, lines with one beyond the checkpoint are dropped."""

MOST_LOG_BYTES = 1 << 30
"""Bytes of a log that is read."""
MOST_LINE_BYTES = 1 << 23
"""Bytes of one line of a log. A larger line is passed over, as one that is cut off."""

Number: TypeAlias = int | float | None
"""A JSON number; None for NaN and infinity, which JSON does not have."""


@dataclass(frozen=True)
class MetricsLine:
    """One line of ``metrics.jsonl``.

    ``time``: seconds since the epoch. ``values``: by flat name such as ``train/loss``.
    """

    step: int
    time: float
    values: dict[str, Number]

    @property
    def is_training(self) -> bool:
        """True when the line belongs to a step of training."""
        return any(name.startswith(TRAINING) for name in self.values)

    def as_json(self) -> dict[str, JsonValue]:
        """Return the line as its JSON object."""
        return {"step": self.step, "time": self.time, **self.values}


class MetricsLog:
    """Appends scalars to ``path``. Opening it removes a last line that a kill has cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_incomplete_line(path)

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Append one line. Values may be Python, numpy or torch scalars; NaN and infinity become null."""
        numbers = {name: to_number(value) for name, value in values.items()}
        append_line(self.path, MetricsLine(int(step), round(time.time(), 3), numbers).as_json())

    def rewind(self, step: int) -> int:
        """Remove training's lines beyond ``step``, whose steps will run again. Return how many lines were removed."""
        lines = read_metrics(self.path)
        kept = [line for line in lines if not (line.is_training and line.step > step)]
        if len(kept) < len(lines):
            write_metrics(self.path, kept)
        return len(lines) - len(kept)

    def read(self) -> list[MetricsLine]:
        """Return all complete lines in the order they were written."""
        return read_metrics(self.path)


def to_number(value: SupportsFloat) -> Number:
    """Return ``value`` as a JSON number; None when it is not finite or cannot be converted."""
    if isinstance(value, bool | int):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def append_line(path: Path, line: JsonObject) -> None:
    """Append ``line`` with a single write: a reader sees all of it or, after a kill, an incomplete end.

    What a full disk took of the line is removed again. Raises :class:`~cogflow.errors.StorageError`.
    """
    left = memoryview(json.dumps(line, allow_nan=False, ensure_ascii=False).encode() + b"\n")
    with storage_errors(path), open_to_append(path) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def read_metrics(path: Path) -> list[MetricsLine]:
    """Return the lines of ``metrics.jsonl``. Lines that are cut off or without a step are left out. No file: none."""
    found = []
    for line in read_lines(path):
        step, written = line.get("step"), line.get("time")
        if not isinstance(step, int):
            continue
        numbers: dict[str, Number] = {
            name: value
            for name, value in line.items()
            if name not in ("step", "time") and (value is None or isinstance(value, int | float))
        }
        found.append(MetricsLine(step, float(written) if isinstance(written, int | float) else 0.0, numbers))
    return found


def write_metrics(path: Path, lines: Iterable[MetricsLine]) -> None:
    """Write ``lines`` to ``path`` in one step."""
    write_text(path, "".join(json.dumps(line.as_json(), allow_nan=False) + "\n" for line in lines))


def append_event(path: Path, event: Event) -> None:
    """Append ``event``. NaN and infinity in its cells must be replaced before."""
    append_line(path, record_values(event))


def read_events(path: Path) -> list[Event]:
    """Return the events of ``events.jsonl``. Lines that are cut off, damaged or of an unknown kind are left out."""
    found = []
    for line in read_lines(path):
        kind = EVENT_KINDS.get(str(line.get("kind")))
        if kind is not None:
            with contextlib.suppress(CogflowError):
                found.append(parse_record(json.dumps(line), kind, str(path)))
    return found


def read_lines(path: Path) -> list[dict[str, JsonValue]]:
    """Return the JSON objects of ``path``, one a line.

    Lines that are cut off or no object are left out. No file: none.
    """
    if not path.is_file():
        return []
    found = []
    for line in read_regular(path, MOST_LOG_BYTES).split(b"\n"):
        try:
            value = parse_json(line, MOST_LINE_BYTES)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def split_lines(path: Path, chosen: Callable[[JsonObject], bool]) -> tuple[list[str], list[str]]:
    """Return the lines of ``path`` for which ``chosen`` returns true, and the others. No file: none.

    A line that is cut off or no JSON object is among the others.
    """
    if not path.is_file():
        return [], []
    yes: list[str] = []
    no: list[str] = []
    for line in read_regular(path, MOST_LOG_BYTES).decode("utf-8", "replace").split("\n"):
        if not line:
            continue
        try:
            value = parse_json(line, MOST_LINE_BYTES)
        except ValueError:
            value = None
        (yes if isinstance(value, dict) and chosen(value) else no).append(line)
    return yes, no


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write ``lines`` to ``path`` in one step."""
    write_text(path, "".join(f"{line}\n" for line in lines))


def drop_incomplete_line(path: Path) -> None:
    """Remove what follows the last line break: the next line would be joined to it, and both would be lost."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        text = file.read()
        if text and not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)
