"""Contrast, brightness, haze, colour and clipping: what a wrong VAE scale or guidance changes and blur does not.

Luma ``[B, H, W]`` and colour ``[B, H, W, 3]``, float32 in 0..1, to one number per frame ``[B]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAR_END = 1.5 / 255  # within one 8-bit level of black or white
DARK = 0.05


def contrast(luma: Tensor) -> Tensor:
    """Standard deviation of luma within a frame, 0..0.5 (root mean square contrast, Peli 1990). Moved by content, hardly by blur."""
    return luma.std(dim=(-2, -1), correction=0)


def brightness(luma: Tensor) -> Tensor:
    """Mean luma, 0..1."""
    return luma.mean(dim=(-2, -1))


def dark_level(luma: Tensor) -> Tensor:
    """The luma that 5 % of the pixels lie below, 0..1, of every fourth row and column. A veil of haze lifts it (the dark channel prior of
    He et al. 2009, without its local windows); so does a picture that is brighter as a whole, or has nothing dark in it."""
    return torch.quantile(luma[..., ::4, ::4].flatten(-2), DARK, dim=-1)


def saturation(colour: Tensor, luma: Tensor) -> Tensor:
    """Root mean square of the colour differences red - luma and blue - luma, 0 (grey) to 0.6. Follows contrast, for colours fade with
    it."""
    red, blue = colour[..., 0] - luma, colour[..., 2] - luma
    return ((red.square() + blue.square()).mean(dim=(-2, -1)) / 2).sqrt()


def clipped(colour: Tensor) -> Tensor:
    """Share of pixels that have a channel within one 8-bit level of its ends, 0..1. Night skies and drawings have many by nature."""
    return ((colour.amin(dim=-1) <= NEAR_END) | (colour.amax(dim=-1) >= 1 - NEAR_END)).float().mean(dim=(-2, -1))
