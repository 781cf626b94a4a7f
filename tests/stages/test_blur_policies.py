"""Test a real run with a far too large learning rate: reported, stopped, rolled back to the last sharp checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cogflow.config.compose import compose
from cogflow.sharpness.quality_watch import LEVELS
from tests import small
from tests.conftest import Command
from tests.scenarios import sabotage
from tests.shell_words import printed_commands, words_of
from tests.stages.conftest import lines, losses
from tests.tracking.conftest import Recorded

SPOILT = ["stage.steps=6", "stage.learning_rate=0.1"]


def words(flow: Path, name: str) -> list[str]:
    return [
        "stage=train",
        "debug=quick",
        f"run.root={flow.parent}",
        f"run.name={name}",
        f"data.path={flow / 'data'}",
        "stage.save_every=2",
        "stage.sample_every=2",
        "stage.schedule=constant",
        "tracking.wandb=disabled",
    ]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in every if event["kind"] == kind]


def copied(folder: Path, name: str) -> Path:
    shutil.copytree(folder, folder.parent / name)
    return folder.parent / name


def weights(folder: Path) -> bytes:
    return (folder / "checkpoints/step-000006/transformer/diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def sharp(flow: Path, cogflow: Command) -> Path:
    """Return a run of two harmless steps, with a checkpoint and a good validation after them."""
    folder = flow.parent / "sharp"
    folder.mkdir()
    shutil.copytree(flow / "cache", folder / "cache")
    cogflow(*words(flow, "sharp"), "stage.steps=2", "stage.learning_rate=1e-5")
    return folder


@pytest.fixture(scope="module")
def stopped(flow: Path, sharp: Path, cogflow: Command) -> Path:
    folder = copied(sharp, "stopped")
    done = cogflow(*words(flow, "stopped"), *SPOILT, "stage.on_blur=stop", code=3)
    assert str(folder / "checkpoints/step-000002") in done.stderr and "Step 4" in done.stderr
    return folder


@pytest.mark.slow
def test_an_alarm_stops_the_run_with_a_checkpoint_a_verdict_and_a_picture(stopped: Path) -> None:
    verdict = {
        step: json.loads((stopped / f"checkpoints/step-00000{step}/trainer.json").read_text())["validation"]
        for step in (2, 4)
    }
    assert verdict[2]["level"] in LEVELS[:2] and verdict[2]["score"] == 0.0
    assert verdict[4]["level"] == "alarm" and verdict[4]["score"] < -3 and verdict[4]["defects"]
    alerts = [event for event in events(stopped, "alert") if "picture" in event]
    assert alerts and all(len(event["title"]) < 64 and (stopped / event["picture"]).is_file() for event in alerts)
    levels = {line["step"]: line["watch/level"] for line in lines(stopped, "watch/level")}
    assert levels[4] == 3.0 and levels[2] < 2.0
    assert any(name.startswith("heldout/high_q") for line in lines(stopped, "heldout/loss") for name in line)


@pytest.mark.slow
def test_the_same_command_does_not_continue_after_an_alarm(flow: Path, stopped: Path, cogflow: Command) -> None:
    before = sorted(path.name for path in (stopped / "checkpoints").iterdir())
    done = cogflow(*words(flow, "stopped"), *SPOILT, "stage.on_blur=stop", code=3)
    assert "An alarm stopped the run at its newest checkpoint" in done.stderr
    configs = [compose(words_of(line)) for line in printed_commands(done.stderr)]
    assert [config.stage.on_blur for config in configs] == ["rollback", "warn"]
    assert all((config.run.name, config.data.path) == ("stopped", str(flow / "data")) for config in configs)
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == before


@pytest.mark.slow
def test_a_rollback_trains_the_same_in_one_process_and_in_two(
    flow: Path, sharp: Path, stopped: Path, cogflow: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop rolls back in its process; a stopped run rolls back when it is resumed. Both are equal to the bit."""
    tamed = ["stage.on_blur=rollback", "stage.rollback.learning_rate_ratio=1e-4"]
    one = copied(sharp, "one-process")
    with monkeypatch.context() as environment:
        environment.setenv("WANDB_MODE", "offline")
        done = cogflow(*words(flow, "one-process"), *SPOILT, *tamed)
    assert "rolling back to" in done.stdout
    spoilt, tame = (
        Recorded(next(one.glob(f"wandb/offline-run-*/run-*-{name}.wandb"))) for name in ("train", "train-line2")
    )
    assert [[row["step"] for row in run.history if "train/loss" in row] for run in (spoilt, tame)] == [
        [3, 4], [3, 4, 5, 6]
    ]  # fmt: skip
    assert tame.name == "one-process train line 2, from step 2" and "rollback" in tame.config["line"]["reason"]
    two = copied(stopped, "two-processes")
    cogflow(*words(flow, "two-processes"), *SPOILT, *tamed)
    assert weights(one) == weights(two) and losses(one) == losses(two)
    assert [line["step"] for line in lines(one)] == [1, 2, 3, 4, 5, 6]
    assert [line["train/lr"] for line in lines(one)][2:] == pytest.approx([1e-5] * 4)
    for folder in (one, two):
        noted = json.loads((folder / "history.json").read_text())["lines"][-1]["rollbacks"]
        assert [(entry["start"], entry["to"], entry["learning_rate_ratio"]) for entry in noted] == [(4, 2, 1e-4)]
        assert (folder / "replaced/01/samples/step-000004/samples.json").is_file()
        assert {line["step"] for line in lines(folder / "replaced/01")} == {3, 4}
    assert (two / "replaced/01/checkpoints/step-000004/trainer.json").is_file()
    # The same command reports the finished run, and does not resume what was set aside.
    assert "finished" in cogflow(*words(flow, "one-process"), *SPOILT, *tamed).stdout


@pytest.mark.slow
def test_a_rollback_without_settings_stops_at_the_sharp_checkpoint(flow: Path, sharp: Path, cogflow: Command) -> None:
    folder = copied(sharp, "no-settings")
    done = cogflow(*words(flow, "no-settings"), *SPOILT, "stage.on_blur=rollback", code=3)
    assert "the same settings would repeat the same run" in done.stderr
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest.json", "step-000002"]
    assert json.loads((folder / "checkpoints/latest.json").read_text())["step"] == 2
    # With the rate the checkpoint was trained with nothing is changed; with the other one something is.
    done = cogflow(
        *words(flow, "no-settings"), "stage.steps=2", "stage.learning_rate=1e-5", "stage.on_blur=rollback", code=3
    )
    assert "would repeat the same run" in done.stderr
    cogflow(*words(flow, "no-settings"), "stage.steps=6", "stage.learning_rate=1e-4", "stage.on_blur=rollback")


@pytest.mark.slow
def test_a_resumed_watch_and_trend_equal_the_uninterrupted_ones(flow: Path, sharp: Path, cogflow: Command) -> None:
    calm = ["stage.steps=6", "stage.learning_rate=1e-5", "stage.keep_last=9"]
    whole, parts = copied(sharp, "whole"), copied(sharp, "parts")
    cogflow(*words(flow, "whole"), *calm)
    cogflow(*words(flow, "parts"), *calm)
    shutil.rmtree(parts / "checkpoints/step-000006")
    cogflow(*words(flow, "parts"), *calm)
    numbers = [
        [{name: value for name, value in line.items() if name.startswith(prefix)} for line in lines(folder, needed)]
        for folder in (whole, parts)
        for prefix, needed in (
            ("spectrum/", "spectrum/high_q4"),
            ("watch/", "watch/level"),
            ("heldout/", "heldout/loss"),
        )
    ]
    assert numbers[:3] == numbers[3:] and len(numbers[1]) == 3
    assert weights(whole) == weights(parts)


@pytest.mark.slow
def test_two_ranks_roll_back_together(flow: Path, cogflow: Command, tmp_path: Path) -> None:
    """In ZeRO-3, whose gathers the ranks must call alike. A model of two blocks has less than half of its gathers."""
    folder = flow.parent / "two-ranks"
    folder.mkdir()
    shutil.copytree(flow / "cache", folder / "cache")
    two = [
        *words(flow, folder.name),
        "deepspeed=zero3",
        f"model.path={small.pipeline(tmp_path / 'model')}",
        "stage.batch_size=1",
        "stage.ema_decay=0.5",
        "stage.ema_warmup=false",
    ]
    cogflow(*two, "stage.steps=2", "stage.learning_rate=1e-5", ranks=2)
    cogflow(*two, *SPOILT, "stage.on_blur=rollback", "stage.rollback.learning_rate_ratio=1e-4", ranks=2)
    assert json.loads((folder / "history.json").read_text())["lines"][-1]["rollbacks"][0]["to"] == 2
    assert lines(folder, "ema/heldout_loss") and lines(folder)[-1]["step"] == 6
    saved = load_file(folder / "checkpoints/step-000006/transformer/diffusion_pytorch_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in saved.values())


@pytest.mark.slow
def test_latents_at_another_scale_are_reported_before_the_first_step(flow: Path, cogflow: Command) -> None:
    folder = flow.parent / "rescaled"
    folder.mkdir()
    shutil.copytree(flow / "cache", folder / "cache")
    sabotage.rescale_cache(folder / "cache")
    unwatched = [word for word in words(flow, "rescaled") if word != "stage.sample_every=2"]
    cogflow(*unwatched, "stage.steps=1", "stage.sample_every=0")
    (alert,) = [event for event in events(folder, "alert") if "scale" in event["title"]]
    assert "scaling_factor" in alert["text"] and len(alert["title"]) < 64
    assert lines(folder, "heldout/scale")[0]["heldout/scale"] > 1.3
    assert lines(flow, "heldout/scale")[0]["heldout/scale"] == pytest.approx(1.0, abs=0.15)
    assert not [event for event in events(flow, "alert") if "scale" in event["title"]]
