"""What decoders make of latents off their manifold. Luma ``[B, H, W]`` to ``[B]``."""

from __future__ import annotations

import torch
from torch import Tensor

PERIOD = 8  # pixels of one latent


def grid(luma: Tensor) -> Tensor:
    """Log of the step across borders of 8x8 blocks over the mean step elsewhere: 0 without a grid."""
    logs = []
    for dim in (-2, -1):
        step = (luma.narrow(dim, 1, luma.shape[dim] - 1) - luma.narrow(dim, 0, luma.shape[dim] - 1)).abs()
        profile = step.mean(dim=-1 if dim == -2 else -2)
        whole = profile[..., : profile.shape[-1] // PERIOD * PERIOD].unflatten(-1, (-1, PERIOD)).mean(dim=-2)
        logs.append(((whole[..., PERIOD - 1] + 1e-6) / (whole.mean(dim=-1) + 1e-6)).log())
    return torch.stack(logs).mean(dim=0)
