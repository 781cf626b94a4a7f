"""Weights that move, weights that move too little for their dtype, and weights that nothing trains."""

from __future__ import annotations

import pytest
import torch

from cogflow.training.update_check import STUCK_STEPS, UpdateCheck, stuck_line


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(64, 64, dtype=dtype) for _ in range(4)))


def stepped(module: torch.nn.Module, rate: float) -> float:
    """Share that one step of AdamW with random gradients leaves bit for bit as it was."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0)
    movement = UpdateCheck(module)
    movement.before()
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return float(movement.unchanged())


def test_fp32_moves_at_a_usual_rate_and_bf16_alone_loses_most_of_it() -> None:
    """The weights are of size 0.07: bf16's next number is 0.0005 away, and half of that is the least step that moves one."""
    assert stepped(model(), 1e-5) < 0.01
    assert stepped(model(torch.bfloat16), 1e-5) > 0.8
    assert stepped(model(torch.bfloat16), 1e-2) < 0.05


def test_what_is_frozen_is_not_looked_at() -> None:
    module = model()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith("3."))
    movement = UpdateCheck(module)
    with torch.no_grad():
        module[0].weight.add_(1)
    assert movement.since_anchor(1) == (1.0, 1)
    with torch.no_grad():
        module[3].weight.add_(1)
        module[3].bias.add_(1)
    assert movement.since_anchor(5) == (0.0, 4)


def test_it_is_told_only_when_nothing_moves_for_long_enough() -> None:
    assert stuck_line(100, 1.0, STUCK_STEPS - 1) is None and stuck_line(100, 0.9, 1000) is None
    line = stuck_line(100, 1.0, STUCK_STEPS)
    assert line is not None and "step 100: 100.00% of the sampled weights" in line and "stage.learning_rate" in line


def test_a_share_of_weights_on_a_rank_may_be_empty() -> None:
    """As ZeRO-3 leaves it on the last of many ranks."""
    module = model()
    for parameter in module.parameters():
        parameter.ds_tensor = torch.empty(0)
    movement = UpdateCheck(module)
    movement.before()
    assert float(movement.unchanged()) == pytest.approx(0.0)
