"""What decoders make of latents off their manifold. Luma ``[B, H, W]`` to ``[B]``."""

from __future__ import annotations

import torch
from torch import Tensor

PERIOD = 8  # pixels that one latent pixel becomes; a period of 16 (one token) lies on the same borders
FLOOR = 1e-4  # of a mean step of luma: a fortieth of an 8-bit level


def grid(luma: Tensor) -> Tensor:
    """Log of the mean step |x[i + 1] - x[i]| across the borders of 8x8 blocks over that inside them, rows and columns averaged: 0 without a
    grid, positive where blocks do not meet, negative where their borders are smoothed. Inside means at an even distance from the border, so
    that a clip that was scaled up by 2, whose steps alternate, shows no grid.

    The blockiness of Wang, Bovik and Evans (ICIP 2000), in the pixel domain. It counts from the frame's corner: frames cropped after
    decoding hide their grid from it. Fooled by drawn patterns of the same period, and by JPEG or H.264 blocks in training clips.
    """
    logs = []
    for dim, other in ((-2, -1), (-1, -2)):
        size = luma.shape[dim]
        step = (luma.narrow(dim, 1, size - 1) - luma.narrow(dim, 0, size - 1)).abs().mean(dim=other)
        phases = step[..., : step.shape[-1] // PERIOD * PERIOD].unflatten(-1, (-1, PERIOD)).mean(dim=-2)
        inside = phases[..., 1 : PERIOD - 1 : 2].mean(dim=-1)
        logs.append(((phases[..., PERIOD - 1] + FLOOR) / (inside + FLOOR)).log())
    return torch.stack(logs).mean(dim=0)
