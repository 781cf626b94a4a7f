"""Test which checkpoints retention keeps."""

from __future__ import annotations

from pathlib import Path

from cogflow.artifacts.run_layout import step_folders, step_of
from cogflow.config.train_settings import TrainStage
from cogflow.files.record_io import write_record
from cogflow.records.training_records import ValidationRecord
from cogflow.training.retention import quality, remove_old, sharp_checkpoints, to_delete
from tests.training.trainer_records import trainer_record, verdict


def saved(folder: Path, verdicts: dict[int, ValidationRecord | None]) -> Path:
    """Write a record for each step into ``folder``; return it."""
    for step, validation in verdicts.items():
        path = folder / f"step-{step:06d}"
        path.mkdir(parents=True)
        write_record(path / "trainer.json", trainer_record(step, validation=validation))
    return folder


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in step_folders(folder)]


def test_the_newest_the_best_and_the_last_sharp_checkpoint_stay(tmp_path: Path) -> None:
    scores = {10: -0.5, 20: -0.1, 30: -0.2, 40: -4.0, 50: -6.0, 60: -7.0}
    folder = saved(tmp_path, {step: verdict(step, score, 0.1) for step, score in scores.items()})
    remove_old(folder, TrainStage(keep_last=2, keep_best=1), 35)
    assert steps(folder) == [20, 30, 50, 60]


def test_without_verdicts_only_the_newest_stay(tmp_path: Path) -> None:
    folder = saved(tmp_path, dict.fromkeys((10, 20, 30)))
    remove_old(folder, TrainStage(keep_last=1, keep_best=3), None)
    assert steps(folder) == [30]


def test_checkpoints_at_round_numbers_stay(tmp_path: Path) -> None:
    folder = saved(tmp_path, dict.fromkeys((10, 20, 30, 40, 50)))
    remove_old(folder, TrainStage(keep_last=1, keep_every=20), None)
    assert steps(folder) == [20, 40, 50]


def test_ties_go_to_the_lower_heldout_loss_then_to_the_newer(tmp_path: Path) -> None:
    paths = [tmp_path / f"step-{step:06d}" for step in (1, 2, 3, 4)]
    losses = dict(zip(paths, (0.3, 0.1, 0.1, None), strict=True))
    verdicts = {path: verdict(step_of(path), 0.0, loss) for path, loss in losses.items()}
    assert to_delete(paths, verdicts, last=1, every=0, best=1, sharp=None) == paths[:2]
    ordered = [verdict(1, 0.0, 0.1), verdict(1, 0.0), verdict(1, -1.0), None]
    assert sorted(map(quality, ordered), reverse=True) == list(map(quality, ordered))


def test_the_verdict_of_another_step_does_not_count(tmp_path: Path) -> None:
    """A checkpoint between two validations carries the verdict of the earlier one, which does not judge this
    checkpoint.
    """
    folder = saved(tmp_path, {10: verdict(10, -1.0), 20: verdict(15, 0.0), 30: None})
    remove_old(folder, TrainStage(keep_last=1, keep_best=1), None)
    assert steps(folder) == [10, 30]


def test_a_checkpoint_after_the_last_good_validation_is_not_sharp(tmp_path: Path) -> None:
    folder = saved(tmp_path, dict.fromkeys((10, 20, 30)))
    assert [step_of(path) for path in sharp_checkpoints(folder, 25)] == [10, 20]
    assert [step_of(path) for path in sharp_checkpoints(folder, 30)] == [10, 20, 30]
    assert sharp_checkpoints(folder, 0) == []
    assert sharp_checkpoints(folder, None) == []


def test_a_record_that_cannot_be_read_counts_as_no_verdict(tmp_path: Path) -> None:
    folder = saved(tmp_path, {10: verdict(10, 0.0), 20: None, 30: None})
    (folder / "step-000010/trainer.json").write_text("{")
    remove_old(folder, TrainStage(keep_last=1, keep_best=2), None)
    assert steps(folder) == [30]
