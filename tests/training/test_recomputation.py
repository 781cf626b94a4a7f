"""Test that recomputation does not change gradients, under every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cogflow.config.compose import compose
from cogflow.config.deepspeed_section import KEEPS, SHARDED_KEEPS
from cogflow.training.activation_memory import kept_activations
from tests.faults.server import Server


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_gradients_do_not_depend_on_kept_activations(server: Server, tmp_path: Path, zero: int) -> None:
    keeps = (None, "auto", *(SHARDED_KEEPS if zero == 3 else KEEPS))
    cases = [json.dumps({"what": "kept", "zero": zero, "keep": keep}) for keep in keeps]
    done = server.run(str(tmp_path / "found.json"), *cases, seconds=600, program="tests.training.updates")
    assert done.codes == [0], done.text[-6000:]
    expected, *norms = json.loads((tmp_path / "found.json").read_text())
    for keep, found in zip(keeps[1:], norms, strict=True):
        assert found == pytest.approx(expected, rel=1e-9), keep


def words(*more: str) -> Any:
    return compose(
        [
            "stage=train",
            "model=cogvideox-5b",
            "stage.ema_decay=0",
            "stage.plan=true",
            "stage.plan_memory_gb=141",
            "stage.plan_gpus=8",
            *more,
        ]
    )


def test_zero3_keeps_no_activations() -> None:
    assert kept_activations(words("deepspeed=zero3")) == {"nothing": 42, "everything": 0}
    assert set(kept_activations(words("deepspeed=zero3", "deepspeed.checkpoint_every_block=0")) or {}) == {
        "nothing",
        "everything",
    }
    assert kept_activations(words("deepspeed=zero2")) == {"all": 42, "everything": 0}
