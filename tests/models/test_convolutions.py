"""``use_onednn_convolutions`` changes the VAE's results by rounding only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogflow.models import tiny
from cogflow.models.loading import use_onednn_convolutions

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def vae() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX.from_pretrained(tiny.folder(), subfolder="vae").eval().requires_grad_(False)


@torch.no_grad()
def test_clips_and_latents_are_equal_up_to_rounding(
    vae: AutoencoderKLCogVideoX, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, clip = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for shape in ((1, 16, 3, 4, 6), (1, 3, 9, 32, 48))
    )
    names = list(vae.state_dict())
    before = vae.decode(latents).sample, vae.encode(clip).latent_dist.mean
    assert use_onednn_convolutions(vae) is vae and list(vae.state_dict()) == names
    called = []
    real = torch.nn.Conv3d._conv_forward

    def record_call(*args: Any) -> torch.Tensor:
        called.append(args)
        return real(*args)

    monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", record_call)
    after = vae.decode(latents).sample, vae.encode(clip).latent_dist.mean
    assert not called
    for plain, onednn in zip(before, after, strict=True):
        assert onednn.isfinite().all() and torch.allclose(plain, onednn, atol=1e-5 * float(plain.abs().max()))
    # A copy in another dtype uses torch's own convolutions and leaves the original unchanged.
    copied = torch.nn.Module.to(copy.deepcopy(vae), torch.bfloat16)
    assert copied.decode(latents.bfloat16()).sample.dtype == torch.bfloat16 and called
    assert all(
        getattr(module._conv_forward, "module", None) is module
        for module in copied.modules()
        if isinstance(module, torch.nn.Conv3d)
    )
    assert torch.equal(vae.decode(latents).sample, after[0])


def test_gradients_use_the_original_convolutions(vae: AutoencoderKLCogVideoX) -> None:
    clip = torch.randn(1, 3, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for encoder in (vae, use_onednn_convolutions(vae)):
        given = clip.clone().requires_grad_()
        encoder.encode(given).latent_dist.mean.square().sum().backward()
        gradients.append(given.grad)
    assert gradients[0] is not None and torch.equal(*gradients)  # type: ignore[arg-type]
