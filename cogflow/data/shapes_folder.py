"""The demo's data set: drawn clips as real video files with a metadata.jsonl, made once per setting."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cogflow.config.data_section import DataConfig
from cogflow.data.shapes import COLOURS, MOTION_NAMES, MOTIONS, SHAPES, draw, scenes
from cogflow.data.video import write_video
from cogflow.errors import DataError
from cogflow.files.publish import publish_folder

NEW_COLOURS = ("purple", "orange")
NEW_SHAPES = ("star", "square")
"""Concepts the shipped model has not seen: what a finetune on the drawn clips has to learn."""

_SETTINGS_FILE = "shapes.json"


def with_defaults(data: DataConfig) -> DataConfig:
    """``data`` with its empty lists of concepts filled in. Raises :class:`DataError` for a concept that cannot be drawn."""
    filled = replace(
        data,
        colours=list(data.colours or NEW_COLOURS),
        shapes=list(data.shapes or NEW_SHAPES),
        motions=list(data.motions or MOTION_NAMES),
    )
    for key, known in (("colours", COLOURS), ("shapes", SHAPES), ("motions", MOTIONS)):
        unknown = [name for name in getattr(filled, key) if name not in known]
        if unknown:
            raise DataError(
                f"data.{key} names what cannot be drawn: {', '.join(unknown)}", f"known are: {', '.join(known)}"
            )
    return filled


def draw_folder(folder: Path, data: DataConfig) -> None:
    """Draw ``data.clips`` clips into ``folder``, as mp4 files beside a metadata.jsonl; do nothing when they are there already.

    Clips are drawn at twice the size and twice the frame rate of ``data``, so that the loader really resizes and
    resamples. The folder appears complete or not at all. Raises :class:`DataError` when ``folder`` holds anything else.
    """
    data = with_defaults(data)
    settings = {
        "version": 1,
        **{
            key: getattr(data, key)
            for key in ("clips", "seed", "frames", "height", "width", "fps", "colours", "shapes", "motions")
        },
    }
    ours = folder / _SETTINGS_FILE
    if folder.exists():
        if not ours.is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(
                f"{folder} holds something else than drawn clips",
                "data=shapes draws into an empty or new folder; to train on your own clips use data=folder",
            )
        if ours.is_file() and _complete(folder, settings):
            return
    rows = []
    with publish_folder(folder, replace=True) as partial:
        for number, scene in enumerate(scenes(data.clips, data.seed, data.colours, data.shapes, data.motions)):
            name = f"videos/{number:05d}.mp4"
            frames = draw(scene, 2 * data.frames - 1, 2 * data.height, 2 * data.width)
            # One thread: x264's output depends on their number, and the clips should not depend on the machine.
            write_video(partial / name, frames, 2 * data.fps, crf=12, threads=1)
            rows.append({"file_name": name, "text": scene.caption})
        (partial / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (partial / _SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _complete(folder: Path, settings: dict) -> bool:
    try:
        same = json.loads((folder / _SETTINGS_FILE).read_text(encoding="utf-8")) == settings
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
        return same and all((folder / row["file_name"]).is_file() for row in rows)
    except (OSError, ValueError, KeyError, TypeError):
        return False
