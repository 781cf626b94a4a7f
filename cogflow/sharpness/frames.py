"""Frames for the metrics: checks, frame selection, and conversion to float32 luma and colour on the clip's own device.

Spatial metrics use up to :data:`SPATIAL_FRAMES` frames, evenly spread; temporal metrics use up to
:data:`TEMPORAL_TRIPLES` triples of neighbouring frames. No function here synchronises with the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SPATIAL_FRAMES = 8
TEMPORAL_TRIPLES = 8
SMALLEST = 24  # pixels: below that the third wavelet band is empty
LUMA_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601


def as_clips(clips: Tensor | np.ndarray) -> Tensor:
    """Return ``clips`` as a tensor ``[N, T, H, W, 3]``, uint8 or floating, on its own device.

    Raise ``ValueError`` for another shape or dtype, and for frames below 24 pixels.
    """
    tensor = torch.as_tensor(clips).detach()
    shape = list(tensor.shape)
    if tensor.dim() != 5 or shape[-1] != 3 or 0 in shape:
        raise ValueError(f"frames are [T, H, W, 3], not {shape[1:]}")
    if min(shape[2:4]) < SMALLEST:
        raise ValueError(f"frames are at least {SMALLEST} pixels high and wide, not {shape[2]}x{shape[3]}")
    if not tensor.is_floating_point() and tensor.dtype != torch.uint8:
        raise ValueError(f"frames are uint8 or floating, not {tensor.dtype}")
    return tensor


def spatial_indices(frames: int) -> list[int]:
    """Return the indices of the frames that the spatial metrics use."""
    return evenly_spread(frames, SPATIAL_FRAMES)


def triple_indices(frames: int) -> list[int]:
    """Return the index of the first frame of each triple that the temporal metrics use; none below three frames."""
    return evenly_spread(frames - 2, TEMPORAL_TRIPLES) if frames >= 3 else []


def evenly_spread(count: int, most: int) -> list[int]:
    """Return up to ``most`` indices in ``range(count)``, evenly spread, with both ends."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def to_float(frames: Tensor) -> Tensor:
    """Convert to float32 in 0..1. Non-finite values become black; values beyond the range are cut, as a screen shows
    them.
    """
    if frames.dtype == torch.uint8:
        return frames.to(torch.float32).div_(255)
    return torch.nan_to_num(frames.to(torch.float32), nan=0.0, posinf=0.0, neginf=0.0).clamp_(0, 1)


def to_luma(colour: Tensor) -> Tensor:
    """Convert ``[..., H, W, 3]`` to ``[..., H, W]``, component by component: a matrix product may run in TF32 on a
    GPU.
    """
    red, green, blue = LUMA_WEIGHTS
    return (colour[..., 0] * red).add_(colour[..., 1], alpha=green).add_(colour[..., 2], alpha=blue)


def pool_2x2(image: Tensor) -> Tensor:
    """Return the mean over 2x2 pixels of ``[..., H, W]``; an odd last row or column is left out."""
    down, across = (size // 2 * 2 for size in image.shape[-2:])
    rows = image[..., 0:down:2, :] + image[..., 1:down:2, :]
    return (rows[..., 0:across:2] + rows[..., 1:across:2]).mul_(0.25)


def finite_share(clips: Tensor) -> Tensor:
    """Return the share of finite values over all frames of each clip, ``[N]`` in 0..1."""
    if not clips.is_floating_point():
        return torch.ones(len(clips), device=clips.device)
    return torch.isfinite(clips).flatten(1).float().mean(dim=1)


def repeated_share(clips: Tensor) -> Tensor:
    """Return the share of neighbouring frames that are equal within half an 8-bit level, ``[N]`` in 0..1; every fourth
    row is read.
    """
    if clips.shape[1] < 2:
        return torch.zeros(len(clips), device=clips.device)
    rows = clips[:, :, ::4]
    if clips.dtype == torch.uint8:
        same = (rows[:, 1:] == rows[:, :-1]).flatten(2).all(dim=2)
    else:
        rows = to_float(rows)
        same = ((rows[:, 1:] - rows[:, :-1]).abs() <= 0.5 / 255).flatten(2).all(dim=2)
    return same.float().mean(dim=1)
