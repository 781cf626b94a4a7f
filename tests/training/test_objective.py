"""Test that the loss equals values computed by SAT's code, for every variant of the family."""

from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from safetensors.torch import load_file

from cogflow.models.family import MODEL_SPECS
from cogflow.training.objective import noised, velocity_loss

GOLDEN = Path(__file__).parent.parent / "golden"
VARIANTS = {
    "2b": "cogvideox-2b",
    "5b": "cogvideox-5b",
    "5b-lora": "cogvideox-5b",
    "5b-i2v": "cogvideox-5b-i2v",
    "1.5-5b": "cogvideox1.5-5b",
    "1.5-5b-i2v": "cogvideox1.5-5b-i2v",
}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_value_of_the_loss_equals_sat(variant: str) -> None:
    golden = {
        name.removeprefix("loss."): value for name, value in load_file(GOLDEN / f"loss-{variant}.safetensors").items()
    }
    alphas = CogVideoXDDIMScheduler(**MODEL_SPECS[VARIANTS[variant]].scheduler_config()).alphas_cumprod
    timesteps = golden["idx"]
    assert relative(alphas[timesteps].sqrt(), golden["alphas_cumprod_sqrt"]) < 1e-5
    assert relative(1 / (1 - alphas[timesteps]), golden["weight"]) < 1e-5
    x_t = noised(golden["x0"], golden["noise"], alphas, timesteps)
    assert relative(x_t, golden["noised_input"]) < 1e-5
    losses = velocity_loss(golden["network_output"], golden["x0"], x_t, alphas, timesteps)
    assert relative(losses.x0, golden["denoised"]) < 1e-5
    assert relative(losses.per_sample, golden["per_sample"]) < 1e-5
    assert relative(losses.mean, golden["mean"].squeeze()) < 1e-5


def test_a_wrong_shift_gives_other_values() -> None:
    golden = load_file(GOLDEN / "loss-5b.safetensors")
    alphas = CogVideoXDDIMScheduler(**MODEL_SPECS["cogvideox-2b"].scheduler_config()).alphas_cumprod
    assert (
        relative(
            noised(golden["loss.x0"], golden["loss.noise"], alphas, golden["loss.idx"]), golden["loss.noised_input"]
        )
        > 1e-2
    )


def test_the_loss_is_the_error_of_v_and_finite_at_the_last_timestep() -> None:
    alphas = CogVideoXDDIMScheduler(**MODEL_SPECS["tiny"].scheduler_config()).alphas_cumprod
    generator = torch.Generator().manual_seed(0)
    x0, noise, v = (torch.randn(3, 3, 16, 4, 6, generator=generator) for _ in range(3))
    timesteps = torch.tensor([0, 500, 999])
    a = alphas[timesteps].view(-1, 1, 1, 1, 1)
    target = a.sqrt() * noise - (1 - a).sqrt() * x0
    losses = velocity_loss(v, x0, noised(x0, noise, alphas, timesteps), alphas, timesteps)
    assert alphas[999] == 0 and torch.isfinite(losses.mean)
    torch.testing.assert_close(
        losses.per_sample[1:], (v - target).square().flatten(1).mean(1)[1:].float(), rtol=1e-4, atol=1e-5
    )


def test_the_loss_is_computed_in_fp32_for_a_bf16_prediction() -> None:
    alphas = CogVideoXDDIMScheduler(**MODEL_SPECS["tiny"].scheduler_config()).alphas_cumprod
    x0 = torch.zeros(1, 3, 16, 4, 6)
    losses = velocity_loss(torch.ones(1, 3, 16, 4, 6, dtype=torch.bfloat16), x0, x0, alphas, torch.tensor([999]))
    assert losses.per_sample.dtype == torch.float32 and float(losses.mean) == 1.0
