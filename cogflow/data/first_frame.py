"""What image-to-video training is given of a clip's first frame: encoded ahead with several noises, since the VAE is not there in training.

SAT (``add_noise_to_first_frame`` in sat/diffusion_video.py of zai-org/CogVideo) draws a fresh noise at each step; here each step draws one
of a fixed number of them, all functions of the clip's content.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch

from cogflow.models.transformer_inputs import SIGMA_MEAN, SIGMA_STD

VERSION = 1
"""Raised when the same frame would give other tensors; part of each clip's key."""
FRAME = "first"
"""Name of the frame itself, uint8 ``[H, W, 3]``: validations sample from it."""


def names(variant: int) -> tuple[str, str]:
    """Names of the moments of a noised frame."""
    return f"image_mean_{variant}", f"image_logvar_{variant}"


def encode(vae: Any, frame: torch.Tensor, content: str, variants: int) -> dict[str, torch.Tensor]:
    """The tensors to store for ``frame`` (uint8 ``[H, W, 3]``) of a clip with the hash ``content``: the frame, and by variant mean and
    log variance, fp32 ``[16, 1, h, w]``, not scaled."""
    tensors = {FRAME: frame.clone()}
    for variant in range(variants):
        noisy = noised(frame, content, variant)
        tensors |= dict(zip(names(variant), moments(vae, noisy[None, :, None].to(vae.device, vae.dtype)), strict=True))
    return tensors


def noised(frame: torch.Tensor, content: str, variant: int) -> torch.Tensor:
    """``frame`` (uint8 ``[H, W, 3]``) as fp32 ``[3, H, W]`` in [-1, 1], with normal noise of a log-normal size."""
    seed = hashlib.sha256(f"first frame/{variant}/{content}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(seed[:8], "big"))
    sigma = math.exp(rng.normal(SIGMA_MEAN, SIGMA_STD))
    pixels = frame.permute(2, 0, 1).float() / 127.5 - 1.0
    return pixels + sigma * torch.from_numpy(rng.standard_normal(tuple(pixels.shape), dtype=np.float32))


@torch.no_grad()
def moments(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance of ``pixels`` ``[1, 3, T, H, W]`` in [-1, 1], on the VAE's device: fp32 ``[16, t, h, w]`` on the CPU."""
    posterior = vae.encode(pixels).latent_dist
    return posterior.mean[0].float().cpu(), posterior.logvar[0].float().cpu()
