"""Which checkpoints stay: the newest, those at round numbers, the best by what the watch saw, and the last one known to be sharp."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogflow.artifacts.run_layout import step_folders, step_of
from cogflow.errors import CheckpointError
from cogflow.files.atomic_write import LEFTOVER, remove_leftovers
from cogflow.runtime import ranks
from cogflow.training.checkpoint import read_trainer

SHARP = ("good", "learning")
"""Levels of the watch at which nothing is wrong."""


def last_sharp(folder: Path, quiet: int | None) -> Path | None:
    """The newest checkpoint that is not younger than ``quiet``, the step of the last validation at which nothing was wrong."""
    paths = [path for path in step_folders(folder) if quiet is not None and step_of(path) <= quiet]
    return paths[-1] if paths else None


def rank(verdict: Mapping[str, Any] | None) -> tuple[float, float]:
    """What checkpoints are ordered by, higher is better: the watch's score, then the held-out loss. Nothing known is worst."""
    if not verdict or verdict.get("score") is None:
        return -math.inf, -math.inf
    loss = verdict.get("heldout_loss")
    return float(verdict["score"]), -math.inf if loss is None else -float(loss)


def to_delete(
    paths: Sequence[Path],
    verdicts: Mapping[Path, Mapping[str, Any] | None],
    *,
    last: int,
    every: int,
    best: int,
    sharp: Path | None,
) -> list[Path]:
    """Those of ``paths`` (oldest first) that nothing keeps. Of equally good ones the newer stays."""
    judged = [path for path in paths if rank(verdicts.get(path))[0] > -math.inf]
    judged.sort(key=lambda path: (*rank(verdicts[path]), step_of(path)), reverse=True)
    round_ones = [path for path in paths if every and step_of(path) % every == 0]
    kept = {*paths[-max(1, last) :], *round_ones, *judged[:best], *([sharp] if sharp else [])}
    return [path for path in paths if path not in kept]


def remove_old(folder: Path, *, last: int, every: int, best: int, quiet: int | None) -> None:
    """Delete what nothing keeps. Called after a new checkpoint was read back whole, so one is always there. Rank 0 works."""
    if not ranks.is_main():
        return
    paths = step_folders(folder)
    verdicts = {path: verdict_of(path) for path in paths}
    for path in to_delete(paths, verdicts, last=last, every=every, best=best, sharp=last_sharp(folder, quiet)):
        # Out of sight first: a kill in the middle leaves no broken checkpoint to be wondered at.
        hidden = folder / f".{path.name}.partial-{os.getpid()}"
        path.rename(hidden)
        _delete(hidden)


def _delete(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def sweep_all(folder: Path) -> None:
    """Remove what a killed run left half-saved or half-deleted, and put back what it was replacing. Rank 0 works."""
    if ranks.is_main() and folder.is_dir():
        for name in {match["name"] for entry in folder.iterdir() if (match := LEFTOVER.match(entry.name))}:
            remove_leftovers(folder / name)


def verdict_of(path: Path) -> dict[str, Any] | None:
    """What its validation said of a checkpoint, of that very step; ``None`` when there was none."""
    try:
        trainer = read_trainer(path)
    except CheckpointError:
        return None
    verdict = trainer.get("validation")
    return verdict if isinstance(verdict, dict) and verdict.get("step") == trainer.get("step") else None
