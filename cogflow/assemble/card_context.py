"""What a model card tells beyond the components: how the transformer was trained, its samples, the ladder, the command."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogflow.runtime.progress import clock
from cogflow.sampling.records import read_record

SHEET = "contact.png"
FOLDER = "samples"


@dataclass(frozen=True)
class CardContext:
    """``run``: that trained the transformer; ``samples``: the folder of its samples, by these very weights; ``None``: unknown.
    ``command``: that assembles. Folders are looked into when the card is written, after the check has measured the last rung."""

    run: Path | None = None
    samples: Path | None = None
    command: str = ""


def take_along(story: CardContext | None, partial: Path) -> dict[str, Any]:
    """Copy the sample videos to ``partial/samples``, and gather what the card shows: ``training`` (rows), ``videos``, ``sheet``, ``ladder``
    (columns and rows) and ``command``."""
    if story is None:
        return {}
    found: dict[str, Any] = {"command": command_without_places(story.command), "training": training(story.run)}
    if story.samples is not None:
        record = read_record(story.samples)
        (partial / FOLDER).mkdir()
        for sample in record["samples"]:
            shutil.copyfile(story.samples / sample["video"], partial / FOLDER / sample["video"])
        found["videos"] = [(f"{FOLDER}/{sample['video']}", sample["text"]) for sample in record["samples"]]
        if (story.samples / SHEET).is_file():
            shutil.copyfile(story.samples / SHEET, partial / FOLDER / SHEET)
            found["sheet"] = f"{FOLDER}/{SHEET}"
        if story.run is not None and (rows := ladder(story.run)):
            found["ladder"] = rows
    return found


def ladder(run: Path) -> tuple[list[str], list[list[Any]]] | None:
    """Columns and rows of a run's ladder; ``None`` where there is none."""
    # Statistics are a tenth of the memory of an assembly, and most have no run.
    from cogflow.ladder import store
    from cogflow.ladder.ladder_report import COLUMNS, cells
    from cogflow.ladder.rungs import work_out

    rows, _ = work_out(store.read(run))
    return (COLUMNS, [cells(row) for row in rows]) if rows else None


def training(run: Path | None) -> list[tuple[str, str]]:
    """Rows of setting and value from a run's train.json; empty where there is none."""
    try:
        record = json.loads(((run or Path()) / "train.json").read_text(encoding="utf-8")) if run is not None else {}
    except (OSError, ValueError):
        return []
    settings: Mapping[str, Any] = record.get("settings") or {}
    stage, data, model = (settings.get(name) or {} for name in ("stage", "data", "model"))
    shared = (settings.get("parallel") or {}).get("sequence", 1)
    rows = [
        ("started from", model.get("name")),
        (
            "clips",
            " x ".join(str(data[key]) for key in ("frames", "height", "width") if key in data)
            + f" at {data.get('fps'):g} frames per second"
            if data.get("fps")
            else None,
        ),
        ("clips per rank and micro step", stage.get("batch_size")),
        ("ranks that share them", shared if shared > 1 else None),
        ("micro steps per step", stage.get("gradient_accumulation")),
        ("learning rate", f"{stage['learning_rate']:g}, {stage.get('schedule')}" if "learning_rate" in stage else None),
        ("captions dropped", stage.get("text_dropout")),
        ("moving average", stage.get("ema_decay") or None),
        ("seed", stage.get("seed")),
        ("ended with", (record.get("results") or {}).get("summary")),
        ("time", clock(float(record["seconds"])) if record.get("seconds") else None),
        (
            "cogflow, torch, diffusers",
            ", ".join(str((record.get("versions") or {}).get(name)) for name in ("cogflow", "torch", "diffusers")),
        ),
    ]
    return [(name, str(value)) for name, value in rows if value is not None] if record else []


def without_places(text: str) -> str:
    """A text without where somebody's disk is mounted: of each absolute path the last two names."""
    return re.sub(r"(?<![\w.~])/(?:[^\s'\"/,\]]+/)+([^\s'\"/,\]]+/[^\s'\"/,\]]+)", r".../\1", text)


def command_without_places(command: str) -> str:
    """As :func:`without_places`; a path with spaces is one word of a command, and known by that."""
    words = [re.sub(r"(?<![\w.~])/(?:[^/,\]]+/)+([^/,\]]+/[^/,\]]+)", r".../\1", word) for word in shlex.split(command)]
    return shlex.join(words)
