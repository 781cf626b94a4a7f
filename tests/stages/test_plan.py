"""The plan of a run beside what that run wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogflow.config.compose import compose
from cogflow.planning.plan import plan


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
    assert len(list((flow / "checkpoints").iterdir())) <= one.disk.most
