"""The lightened update computes what DeepSpeed's own does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cogflow.config.schema import DeepSpeedConfig, TrainStage
from cogflow.training import zero_update
from cogflow.training.engine import Engine


def trained(
    zero: int, dtype: torch.dtype, clipping: float, spoilt: int | None = None
) -> tuple[list[torch.Tensor], list[float], list[bool]]:
    """Weights, gradient norms and whether they were applied, of four steps; the gradient of ``spoilt`` holds an infinity."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.GELU(), torch.nn.Linear(13, 3)).to(dtype)
    stage = TrainStage(batch_size=1, gradient_accumulation=2, gradient_clipping=clipping)
    engine = Engine(module, DeepSpeedConfig(zero_stage=zero), stage, dtype)
    norms, applied = [], []
    for step in range(4):
        for _ in range(2):
            loss = engine.forward(torch.randn(5, 7, dtype=dtype)).square().mean()
            engine.backward(loss * (float("inf") if step == spoilt else 1.0))
            done = engine.step(1e-2)
        applied.append(done)
        norms.append(float(engine.gradient_norm()))
    return [weight.clone() for _, weight in engine.weights()], norms, applied


@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("clipping", [0.0, 0.05])
def test_weights_and_norms_are_those_of_deepspeeds_own(zero: int, dtype: torch.dtype, clipping: float, monkeypatch: Any) -> None:
    mine = trained(zero, dtype, clipping)
    called = []
    monkeypatch.setattr(zero_update, "lighten", lambda *_: called.append(1))
    own = trained(zero, dtype, clipping)
    assert called == [1]
    assert mine[1] == pytest.approx(own[1], rel=1e-6) and min(own[1]) > 0.05 and mine[2] == own[2] == [True] * 4
    assert all(torch.allclose(one, other, rtol=1e-6, atol=0) for one, other in zip(mine[0], own[0], strict=True))


@pytest.mark.parametrize("zero", [1, 2])
def test_a_gradient_that_is_not_finite_is_left_out_by_its_norm(zero: int) -> None:
    weights, norms, applied = trained(zero, torch.bfloat16, 0.05, spoilt=2)
    assert applied == [True, True, False, True] and all(torch.isfinite(weight).all() for weight in weights)


def test_what_fills_up_the_last_part_is_zero() -> None:
    found = zero_update.flat([torch.ones(2, 3, dtype=torch.bfloat16), torch.full((4,), 2.0)], 12, torch.empty(0))
    assert found.tolist() == [1.0] * 6 + [2.0] * 4 + [0.0] * 2 and found.dtype == torch.float32
