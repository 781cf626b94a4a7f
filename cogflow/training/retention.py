"""Retention: keep the newest checkpoints, those at round numbers, the best, the last sharp; delete the others."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from cogflow.artifacts.run_layout import step_folders, step_of
from cogflow.config.train_settings import TrainStage
from cogflow.errors import CheckpointError
from cogflow.files.atomic_write import LEFTOVER, remove_leftovers
from cogflow.records.training_records import ValidationRecord
from cogflow.runtime import ranks
from cogflow.sharpness.quality_watch import LEVELS
from cogflow.training.checkpoint import read_trainer

GOOD_LEVELS = LEVELS[:2]
"""Levels of the quality watch at which nothing is wrong."""


def sharp_checkpoints(folder: Path, last_good_step: int | None) -> list[Path]:
    """Return the checkpoints at or before ``last_good_step``, oldest first: the step of the last validation at which
    nothing was wrong.
    """
    return [path for path in step_folders(folder) if last_good_step is not None and step_of(path) <= last_good_step]


def quality(verdict: ValidationRecord | None) -> tuple[float, float]:
    """Return the sort key of a checkpoint, higher is better: the watch's score, then the held-out loss.

    Without a verdict it is lowest.
    """
    if verdict is None or math.isnan(verdict.score):
        return -math.inf, -math.inf
    loss = verdict.heldout_loss
    return verdict.score, -math.inf if loss is None else -loss


def to_delete(
    paths: Sequence[Path],
    verdicts: Mapping[Path, ValidationRecord | None],
    *,
    last: int,
    every: int,
    best: int,
    sharp: Path | None,
) -> list[Path]:
    """Return those of ``paths`` (oldest first) that no rule keeps. The newer of equally good ones stays."""
    judged = [path for path in paths if quality(verdicts.get(path))[0] > -math.inf]
    judged.sort(key=lambda path: (*quality(verdicts[path]), step_of(path)), reverse=True)
    at_round_numbers = [path for path in paths if every and step_of(path) % every == 0]
    kept = {*paths[-max(1, last) :], *at_round_numbers, *judged[:best], *([sharp] if sharp else [])}
    return [path for path in paths if path not in kept]


def remove_old(folder: Path, stage: TrainStage, last_good_step: int | None) -> None:
    """Delete the checkpoints that no rule keeps. Call it after a new checkpoint was verified. Rank 0 works."""
    if not ranks.is_main():
        return
    paths = step_folders(folder)
    superfluous = to_delete(
        paths,
        {path: verdict_of(path) for path in paths},
        last=stage.keep_last,
        every=stage.keep_every,
        best=stage.keep_best,
        sharp=next(reversed(sharp_checkpoints(folder, last_good_step)), None),
    )
    for path in superfluous:
        # Hide it first, so that a kill in the middle leaves no checkpoint that looks broken.
        hidden = folder / f".{path.name}.partial-{os.getpid()}"
        path.rename(hidden)
        _delete(hidden)


def _delete(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def sweep_all(folder: Path) -> None:
    """Remove what a killed run left half saved or half deleted, and restore what it was replacing. Rank 0 works."""
    if ranks.is_main() and folder.is_dir():
        for name in {match["name"] for entry in folder.iterdir() if (match := LEFTOVER.match(entry.name))}:
            remove_leftovers(folder / name)


def verdict_of(path: Path) -> ValidationRecord | None:
    """Return the verdict of the validation at a checkpoint's own step; ``None`` when there was none or the record
    cannot be read.
    """
    try:
        record = read_trainer(path)
    except CheckpointError:
        return None
    verdict = record.validation
    return verdict if verdict is not None and verdict.step == record.step else None
