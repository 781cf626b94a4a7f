"""Test that the plan of a run agrees with the files of that run."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogflow.config.compose import compose
from cogflow.planning.plan import plan
from tests.conftest import Command
from tests.stages.test_resume import beside


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_checkpoint_is_as_large_as_planned(flow: Path) -> None:
    one = plan(compose(["stage=train", "debug=quick", f"run.root={flow.parent}", f"run.name={flow.name}"]))
    checkpoint = flow / "checkpoints" / "step-000004"
    assert one.disk.deepspeed == pytest.approx(size(checkpoint / "deepspeed"), rel=0.05)
    assert one.disk.weights == pytest.approx(size(checkpoint / "transformer"), rel=0.05)
    assert one.disk.checkpoint == pytest.approx(size(checkpoint), rel=0.05)
    assert one.clips.training == 10 and one.clips.holdout == 2
    assert len(list((flow / "checkpoints").glob("step-*"))) <= one.disk.most


@pytest.mark.slow
def test_a_zero3_bf16_checkpoint_with_ema_is_as_large_as_planned(flow: Path, cogflow: Command) -> None:
    words = [*beside(flow, "sharded"), "deepspeed=zero3", "model.dtype=bf16", "stage.ema_decay=0.9", "stage.steps=2"]
    cogflow(*words)
    one = plan(compose(words)).disk
    checkpoint = flow.parent / "sharded" / "checkpoints" / "step-000002"
    for name, planned in (("deepspeed", one.deepspeed), ("transformer", one.weights), ("ema", one.averages)):
        assert planned == pytest.approx(size(checkpoint / name), rel=0.05), name
    said = cogflow(*words, "stage.plan=true").stdout
    assert "ZeRO-3" in said and "clips: 10 to train on" in said and "it fits" in said
