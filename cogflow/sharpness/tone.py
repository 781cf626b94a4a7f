"""Contrast, brightness, haze, colour and clipping: what a wrong VAE scale or guidance changes and blur does not.

Luma ``[B, H, W]`` and colour ``[B, H, W, 3]``, float32 in 0..1, to one number per frame ``[B]``. All but brightness and clipping look at
means of 4x4 pixels, which neither blur nor noise moves much: a blurred page of text has not lost contrast in the sense meant here.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAR_END = 1.5 / 255  # within one 8-bit level of black or white
DARK = 0.05


def contrast(small: Tensor) -> Tensor:
    """Standard deviation of (pooled) luma within a frame, 0..0.5 (root mean square contrast, Peli 1990). Moved by content."""
    return small.std(dim=(-2, -1), correction=0)


def brightness(luma: Tensor) -> Tensor:
    """Mean luma, 0..1."""
    return luma.mean(dim=(-2, -1))


def dark_level(small: Tensor) -> Tensor:
    """The (pooled) luma that 5 % of the picture lie below, 0..1. A veil of haze lifts it (the dark channel prior of He et al. 2009, without
    its local windows); so does a picture that is brighter as a whole, or has nothing dark in it."""
    return torch.quantile(small.flatten(-2), DARK, dim=-1)


def saturation(red: Tensor, blue: Tensor, luma: Tensor) -> Tensor:
    """Root mean square of the (pooled) colour differences red - luma and blue - luma, 0 (grey) to 0.6. Follows contrast, for colours fade
    with it."""
    return (((red - luma).square() + (blue - luma).square()).mean(dim=(-2, -1)) / 2).sqrt()


def clipped(colour: Tensor) -> Tensor:
    """Share of pixels that have a channel within one 8-bit level of its ends, 0..1. Night skies and drawings have many by nature."""
    return ((colour.amin(dim=-1) <= NEAR_END) | (colour.amax(dim=-1) >= 1 - NEAR_END)).float().mean(dim=(-2, -1))
