"""Contrast, brightness, haze, colour and clipping: what a wrong VAE scale or guidance changes, and blur does not."""

from __future__ import annotations

import torch
from torch import Tensor

from cogflow.sharpness.frames import LUMA


def contrast(luma: Tensor) -> Tensor:
    """Standard deviation of luma within a frame. ``[B, H, W]`` to ``[B]``, 0..0.5."""
    return luma.std(dim=(-2, -1), correction=0)


def brightness(luma: Tensor) -> Tensor:
    """Mean luma, 0..1."""
    return luma.mean(dim=(-2, -1))


def dark_level(luma: Tensor) -> Tensor:
    """The luma that 5 % of the pixels lie below, 0..1, looked at on every fourth row and column. A veil of haze lifts it."""
    sparse = luma[..., ::4, ::4].flatten(-2)
    return torch.quantile(sparse, 0.05, dim=-1)


def saturation(colour: Tensor, luma: Tensor) -> Tensor:
    """Root mean square of the colour differences (red - luma, blue - luma), 0 for grey. ``[B, H, W, 3]`` and ``[B, H, W]`` to ``[B]``."""
    red, blue = colour[..., 0] - luma, colour[..., 2] - luma
    return ((red.square() + blue.square()).mean(dim=(-2, -1)) / 2 + 1e-12).sqrt()


def clipped(colour: Tensor) -> Tensor:
    """Share of pixels with a channel at either end of its range (within one 8-bit level)."""
    return ((colour.amin(dim=-1) <= 1 / 255) | (colour.amax(dim=-1) >= 254 / 255)).float().mean(dim=(-2, -1))


__all__ = ["LUMA", "brightness", "clipped", "contrast", "dark_level", "saturation"]
