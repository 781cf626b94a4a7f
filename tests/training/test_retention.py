"""Which checkpoints stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cogflow.artifacts.run_layout import step_folders, step_of
from cogflow.training.retention import last_sharp, rank, remove_old, to_delete


def made(folder: Path, verdicts: dict[int, dict[str, Any] | None]) -> Path:
    for step, verdict in verdicts.items():
        path = folder / f"step-{step:06d}"
        path.mkdir(parents=True)
        given = None if verdict is None else {"step": step, **verdict}
        (path / "trainer.json").write_text(json.dumps({"step": step, "validation": given}))
    return folder


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in step_folders(folder)]


def test_the_newest_the_best_and_the_last_sharp_one_stay(tmp_path: Path) -> None:
    scores = {10: -0.5, 20: -0.1, 30: -0.2, 40: -4.0, 50: -6.0, 60: -7.0}
    folder = made(tmp_path, {step: {"score": score, "heldout_loss": 0.1} for step, score in scores.items()})
    remove_old(folder, last=2, every=0, best=1, quiet=35)
    assert steps(folder) == [20, 30, 50, 60]


def test_without_a_watch_only_the_newest_stay(tmp_path: Path) -> None:
    folder = made(tmp_path, dict.fromkeys((10, 20, 30)))
    remove_old(folder, last=1, every=0, best=3, quiet=None)
    assert steps(folder) == [30]


def test_ties_go_to_the_lower_heldout_loss_then_to_the_newer(tmp_path: Path) -> None:
    paths = [tmp_path / f"step-{step:06d}" for step in (1, 2, 3, 4)]
    losses = dict(zip(paths, (0.3, 0.1, 0.1, None), strict=True))
    verdicts = {path: {"score": 0.0, "heldout_loss": loss} for path, loss in losses.items()}
    assert to_delete(paths, verdicts, last=1, every=0, best=1, sharp=None) == paths[:2]
    assert (
        rank({"score": 0.0, "heldout_loss": 0.1})
        > rank({"score": 0.0, "heldout_loss": None})
        > rank({"score": -1.0})
        > rank(None)
    )


def test_a_verdict_on_another_step_counts_for_nothing(tmp_path: Path) -> None:
    """A checkpoint between two validations carries the verdict of the one before: it says nothing of this checkpoint."""
    folder = made(tmp_path, {10: {"score": -1.0}, 20: None, 30: None})
    (folder / "step-000020/trainer.json").write_text(json.dumps({"step": 20, "validation": {"step": 15, "score": 0.0}}))
    remove_old(folder, last=1, every=0, best=1, quiet=None)
    assert steps(folder) == [10, 30]


def test_a_checkpoint_younger_than_the_quiet_validation_is_not_sharp(tmp_path: Path) -> None:
    folder = made(tmp_path, dict.fromkeys((10, 20, 30)))
    assert last_sharp(folder, 25) == folder / "step-000020"
    assert last_sharp(folder, 30) == folder / "step-000030"
    assert last_sharp(folder, 0) is None and last_sharp(folder, None) is None


def test_a_broken_trainer_json_is_no_reason_to_fail(tmp_path: Path) -> None:
    folder = made(tmp_path, {10: {"score": 0.0}, 20: None, 30: None})
    (folder / "step-000010/trainer.json").write_text("{")
    remove_old(folder, last=1, every=0, best=2, quiet=None)
    assert steps(folder) == [30]
