"""Going back: nothing is lost, nothing later is picked up again, and the settings hold from there on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogflow.config.schema import RollbackConfig
from cogflow.errors import CheckpointError
from cogflow.training import rollback
from cogflow.training.rollback import Rollback


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for kind in ("checkpoints", "samples"):
        for step in (0, 10, 20, 30, 1_000_000):
            (tmp_path / kind / f"step-{step:06d}").mkdir(parents=True)
            (tmp_path / kind / f"step-{step:06d}" / "here").write_text(str(step))
    lines = [{"step": step, "train/loss": step / 10} for step in range(1, 31)] + [{"step": 40, "prepare/clips": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "events.jsonl").write_text('{"kind": "alert"}\n')
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_came_later_is_set_aside_whole(run: Path) -> None:
    rollbacks = rollback.go_back(run, 30, 10, 0.3, "soft")
    assert rollbacks == [Rollback(1, 30, 10, 0.3, "soft", moved=True)] == rollback.read(run)
    aside = run / "rolled-back" / "01"
    for kind in ("checkpoints", "samples"):
        assert names(run / kind) == ["step-000000", "step-000010"]
        assert names(aside / kind) == ["step-000020", "step-000030", "step-1000000"]
        assert (aside / kind / "step-000020" / "here").read_text() == "20"
    kept = [json.loads(line)["step"] for line in (aside / "metrics.jsonl").read_text().splitlines()]
    assert kept == list(range(11, 31)) and (aside / "events.jsonl").is_file()


def test_a_kill_between_the_note_and_the_moves_is_mended(run: Path) -> None:
    rollback.write(run, [Rollback(1, 30, 10, 0.3, "soft")])
    (run / "rolled-back/01/checkpoints").mkdir(parents=True)
    (run / "checkpoints/step-000020").rename(run / "rolled-back/01/checkpoints/step-000020")
    assert rollback.finish(run)[0].moved
    assert names(run / "checkpoints") == ["step-000000", "step-000010"]
    # What is trained afterwards stays.
    (run / "checkpoints/step-000020").mkdir()
    rollback.finish(run)
    assert "step-000020" in names(run / "checkpoints")


def test_the_rate_is_a_function_of_the_step() -> None:
    two = [Rollback(1, 30, 10, 0.5, "", True), Rollback(2, 40, 20, 0.1, "", True)]
    assert [rollback.rate_factor(two, step) for step in (0, 9, 10, 19, 20, 99)] == pytest.approx(
        [1, 1, 0.5, 0.5, 0.05, 0.05]
    )
    assert rollback.rate_factor([], 5) == 1.0


def test_a_second_rollback_has_a_folder_of_its_own(run: Path) -> None:
    rollback.go_back(run, 30, 20, 0.5, "soft")
    (run / "checkpoints/step-000030").mkdir()
    assert [one.number for one in rollback.go_back(run, 30, 10, 0.5, "soft")] == [1, 2]
    assert names(run / "rolled-back/02/checkpoints") == ["step-000020", "step-000030"]


def test_going_on_needs_other_settings_and_is_limited() -> None:
    assert "same settings" in str(rollback.may_go_on(RollbackConfig(), []))
    settings = RollbackConfig(learning_rate_ratio=0.3, most=1)
    assert rollback.may_go_on(settings, []) is None
    assert "most=1" in str(rollback.may_go_on(settings, [Rollback(1, 30, 10, 0.3, "")]))


def test_a_run_that_starts_anew_is_bound_by_nothing(run: Path) -> None:
    for _ in range(2):
        rollback.go_back(run, 30, 10, 0.3, "soft")
        rollback.forget(run)
        assert rollback.read(run) == []
    assert {"rollback-1.json", "rollback-2.json"} < set(names(run / "rolled-back"))
    rollback.forget(run)


def test_a_broken_file_is_not_guessed_at(run: Path) -> None:
    (run / "rollback.json").write_text('{"rollbacks": [{"to": 3}]}')
    with pytest.raises(CheckpointError, match="rollback.json cannot be read"):
        rollback.read(run)
