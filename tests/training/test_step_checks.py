"""Test the checks of a training step: loss spikes, skipped updates, and weights that do not change."""

from __future__ import annotations

import math
import random

import pytest
import torch

from cogflow.training.step_checks import (
    MAX_CONSECUTIVE_SKIPS,
    SPIKE_MIN_STEPS,
    SPIKE_WINDOW,
    UNCHANGED_STEPS,
    SkipCounter,
    SpikeDetector,
    UpdateCheck,
    not_finite_message,
    unchanged_message,
)


def noisy_losses(count: int, seed: int = 0, level: float = 0.2, spread: float = 0.3) -> list[float]:
    """Return losses of single clips at random timesteps, which spread by factors."""
    drawn = random.Random(seed)
    return [level * math.exp(drawn.gauss(0, spread)) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_loss_has_no_spike_in_three_thousand_steps(seed: int) -> None:
    spikes = SpikeDetector()
    assert [value for value in noisy_losses(3000, seed) if spikes.update(value) is not None] == []


def test_a_spike_is_reported_in_deviations_and_does_not_enter_the_window() -> None:
    spikes = SpikeDetector()
    for value in noisy_losses(SPIKE_WINDOW):
        spikes.update(value)
    sigmas = spikes.update(0.2 * math.exp(0.3 * 10))
    assert sigmas == pytest.approx(10, abs=1.5)
    assert spikes.update(0.2 * math.exp(0.3 * 10)) == sigmas


def test_no_value_is_a_spike_before_the_window_has_enough_steps() -> None:
    spikes = SpikeDetector()
    for value in noisy_losses(SPIKE_MIN_STEPS - 1):
        spikes.update(value)
    assert spikes.update(1e6) is None


def test_a_small_rise_of_a_constant_loss_is_no_spike() -> None:
    spikes = SpikeDetector()
    for _ in range(SPIKE_WINDOW):
        spikes.update(0.2)
    assert spikes.update(0.21) is None
    assert spikes.update(0.3) is not None


def test_a_new_level_is_a_spike_for_a_quarter_of_the_window_only() -> None:
    spikes = SpikeDetector()
    for value in noisy_losses(SPIKE_WINDOW, spread=0.05):
        spikes.update(value)
    higher = noisy_losses(2 * SPIKE_WINDOW, seed=1, level=1.0, spread=0.05)
    reported = [spikes.update(value) is not None for value in higher]
    assert all(reported[: SPIKE_WINDOW // 4])
    assert not any(reported[SPIKE_WINDOW:])


def test_a_restored_spike_detector_continues_equally() -> None:
    first = SpikeDetector()
    values = noisy_losses(200)
    for value in values[:100]:
        first.update(value)
    second = SpikeDetector(first.state_dict())
    assert [first.update(value) for value in values[100:]] == [second.update(value) for value in values[100:]]
    assert first.state_dict() == second.state_dict()


def test_skipped_updates_are_counted_in_total_and_in_a_row() -> None:
    skipped = SkipCounter()
    for applied in [True, False, False, True, *[False] * (MAX_CONSECUTIVE_SKIPS - 1)]:
        skipped.update(applied)
    assert (skipped.total, skipped.in_a_row) == (MAX_CONSECUTIVE_SKIPS + 1, MAX_CONSECUTIVE_SKIPS - 1)
    assert not skipped.too_many
    skipped.update(False)
    assert skipped.too_many
    assert SkipCounter(skipped.state_dict()).too_many


def test_a_step_that_is_not_finite_names_rank_and_clips_or_the_gradient() -> None:
    assert "rank 1: a.mp4, b.mp4)" in not_finite_message(7, [[], ["a.mp4", "b.mp4"]])
    assert "gradient of step 7" in not_finite_message(7, [[], []])


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(64, 64, dtype=dtype) for _ in range(4)))


def unchanged_share(module: torch.nn.Module, rate: float) -> float:
    """Return the share of weights that one step of AdamW with random gradients leaves bit for bit as it was."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0)
    check = UpdateCheck(module)
    check.before_step()
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return float(check.unchanged_by_step())


def test_weights_change_in_fp32_and_mostly_not_in_bf16_alone() -> None:
    """The weights are about 0.07: bf16's next number is 0.0005 away, and half of that is the smallest step that changes
    one.
    """
    assert unchanged_share(model(), 1e-5) < 0.01
    assert unchanged_share(model(torch.bfloat16), 1e-5) > 0.8
    assert unchanged_share(model(torch.bfloat16), 1e-2) < 0.05


def test_frozen_weights_are_not_sampled() -> None:
    module = model()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith("3."))
    check = UpdateCheck(module)
    with torch.no_grad():
        module[0].weight.add_(1)  # type: ignore[index]
    assert check.unchanged_since_anchor(1) == (1.0, 1)
    with torch.no_grad():
        module[3].weight.add_(1)  # type: ignore[index]
        module[3].bias.add_(1)  # type: ignore[index]
    assert check.unchanged_since_anchor(5) == (0.0, 4)


def test_unchanged_weights_are_reported_after_enough_steps_only() -> None:
    assert unchanged_message(100, 1.0, UNCHANGED_STEPS - 1) is None
    assert unchanged_message(100, 0.9, 1000) is None
    message = unchanged_message(100, 1.0, UNCHANGED_STEPS)
    assert message is not None
    assert "step 100: 100.00% of the sampled weights" in message
    assert "stage.learning_rate" in message


def test_the_shard_of_a_rank_may_be_empty() -> None:
    """ZeRO-3 leaves empty shards on the last of many ranks."""
    module = model()
    for parameter in module.parameters():
        parameter.ds_tensor = torch.empty(0)  # type: ignore[attr-defined]
    check = UpdateCheck(module)
    check.before_step()
    assert float(check.unchanged_by_step()) == pytest.approx(0.0)
