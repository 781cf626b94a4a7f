"""Test rollbacks: everything is kept, nothing later is resumed, and the learning rate ratio applies from the checkpoint
on.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogflow.config.train_settings import RollbackConfig
from cogflow.errors import CheckpointError
from cogflow.records.training_records import RollbackEntry
from cogflow.training import rollback


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for kind in ("checkpoints", "samples"):
        for step in (0, 10, 20, 30, 1_000_000):
            (tmp_path / kind / f"step-{step:06d}").mkdir(parents=True)
            (tmp_path / kind / f"step-{step:06d}" / "content").write_text(str(step))
    lines = [{"step": step, "train/loss": step / 10} for step in range(1, 31)] + [{"step": 40, "prepare/clips": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "events.jsonl").write_text('{"kind": "alert"}\n')
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_after_the_checkpoint_is_set_aside(run: Path) -> None:
    rollbacks = rollback.roll_back(run, 30, 10, 0.3, "soft")
    assert rollbacks == [RollbackEntry(1, 30, 10, 0.3, "soft", moved=True)]
    assert rollback.read_rollbacks(run) == rollbacks
    aside = run / "rolled-back" / "01"
    for kind in ("checkpoints", "samples"):
        assert names(run / kind) == ["step-000000", "step-000010"]
        assert names(aside / kind) == ["step-000020", "step-000030", "step-1000000"]
        assert (aside / kind / "step-000020" / "content").read_text() == "20"
    kept = [json.loads(line)["step"] for line in (aside / "metrics.jsonl").read_text().splitlines()]
    assert kept == list(range(11, 31))
    assert (aside / "events.jsonl").is_file()


def test_a_rollback_killed_between_record_and_moves_is_finished(run: Path) -> None:
    rollback.write_rollbacks(run, [RollbackEntry(1, 30, 10, 0.3, "soft")])
    (run / "rolled-back/01/checkpoints").mkdir(parents=True)
    (run / "checkpoints/step-000020").rename(run / "rolled-back/01/checkpoints/step-000020")
    assert rollback.finish_rollback(run)[0].moved
    assert names(run / "checkpoints") == ["step-000000", "step-000010"]
    # A checkpoint that is trained afterwards stays.
    (run / "checkpoints/step-000020").mkdir()
    rollback.finish_rollback(run)
    assert "step-000020" in names(run / "checkpoints")


def test_the_rate_factor_is_a_function_of_the_step() -> None:
    two = [RollbackEntry(1, 30, 10, 0.5, "", True), RollbackEntry(2, 40, 20, 0.1, "", True)]
    factors = [rollback.rate_factor(two, step) for step in (0, 9, 10, 19, 20, 99)]
    assert factors == pytest.approx([1, 1, 0.5, 0.5, 0.05, 0.05])
    assert rollback.rate_factor([], 5) == 1.0


def test_a_second_rollback_has_its_own_folder(run: Path) -> None:
    rollback.roll_back(run, 30, 20, 0.5, "soft")
    (run / "checkpoints/step-000030").mkdir()
    assert [entry.number for entry in rollback.roll_back(run, 30, 10, 0.5, "soft")] == [1, 2]
    assert names(run / "rolled-back/02/checkpoints") == ["step-000020", "step-000030"]


def test_a_rollback_needs_other_settings_and_is_limited() -> None:
    assert "same settings" in str(rollback.refusal(RollbackConfig(), []))
    settings = RollbackConfig(learning_rate_ratio=0.3, most=1)
    assert rollback.refusal(settings, []) is None
    assert "most=1" in str(rollback.refusal(settings, [RollbackEntry(1, 30, 10, 0.3, "")]))


def test_a_run_that_starts_again_forgets_its_rollbacks(run: Path) -> None:
    for _ in range(2):
        rollback.roll_back(run, 30, 10, 0.3, "soft")
        rollback.forget_rollbacks(run)
        assert rollback.read_rollbacks(run) == []
    assert {"rollback-1.json", "rollback-2.json"} < set(names(run / "rolled-back"))
    rollback.forget_rollbacks(run)


def test_a_file_without_a_version_is_read(run: Path) -> None:
    entry = {"number": 1, "start": 30, "to": 10, "learning_rate_ratio": 0.3, "reason": "soft", "moved": True}
    (run / "rollback.json").write_text(json.dumps({"rollbacks": [entry]}))
    assert rollback.read_rollbacks(run) == [RollbackEntry(1, 30, 10, 0.3, "soft", moved=True)]


def test_a_broken_file_is_refused(run: Path) -> None:
    (run / "rollback.json").write_text('{"rollbacks": [{"to": 3}]}')
    with pytest.raises(CheckpointError, match=r"rollback\.json is no valid record"):
        rollback.read_rollbacks(run)
