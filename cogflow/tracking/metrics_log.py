"""metrics.jsonl and events.jsonl: one JSON object a line, appended, readable while the run goes on and after a kill."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cogflow.files.atomic_write import storage_errors, write_text

TRAINING = ("train/", "heldout/", "ema/", "spectrum/", "sharpness/", "watch/", "validation/", "checkpoint/")
"""Names that belong to a step of training. On resume, lines that hold one are dropped beyond the checkpoint's step."""

EVENTS = "events.jsonl"
"""Beside metrics.jsonl: what is not a scalar (videos, images, tables, artifacts, alerts), one JSON object a line with its ``kind``."""


class MetricsLog:
    """Appends scalars to ``path``. Opening mends a last line that a kill has torn."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_tail(path)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line ``{"step", "time", **values}``. Values may be Python, numpy or torch scalars; NaN and infinities become null."""
        line = {"step": int(step), "time": round(time.time(), 3)} | {
            name: number(value) for name, value in values.items()
        }
        append_line(self.path, line)

    def rewind(self, step: int) -> int:
        """Forget what training logged beyond ``step``: those steps are about to run again. Returns how many lines went."""
        lines = read_lines(self.path)
        kept = [line for line in lines if not (_of_training(line) and line.get("step", 0) > step)]
        if len(kept) < len(lines):
            write_text(self.path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept))
        return len(lines) - len(kept)

    def read(self) -> list[dict[str, Any]]:
        """All whole lines, in the order they were written."""
        return read_lines(self.path)


def _of_training(line: Mapping[str, Any]) -> bool:
    return any(name.startswith(TRAINING) for name in line)


def number(value: Any) -> int | float | None:
    """``value`` as a JSON number; ``None`` when it is not finite (JSON knows no NaN) or no number at all."""
    if isinstance(value, bool | int):
        return int(value)
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append ``line`` with a single write, so that a reader sees all of it or, after a kill, a torn end.

    What a full disk took of it is taken back. Raises :class:`~cogflow.errors.StorageError`.
    """
    left = memoryview(json.dumps(line, allow_nan=False, ensure_ascii=False).encode() + b"\n")
    with storage_errors(path), path.open("ab", buffering=0) as file:
        whole = file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(whole)
            raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of ``path``, one a line; lines that are torn or no object are left out. No file: none."""
    if not path.is_file():
        return []
    return list(_objects(path.read_bytes().split(b"\n")))


def _objects(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _drop_torn_tail(path: Path) -> None:
    """Cut what follows the last line break, lest the next line be glued to it and both be lost."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        text = file.read()
        if text and not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)
