"""What the panel looks at: clips of any dtype and place become float32 luma and colour on the device they are on.

Spatial metrics look at up to :data:`SPATIAL_FRAMES` frames, evenly spread; temporal ones at up to :data:`TEMPORAL_TRIPLES` triples of
neighbouring frames. Nothing here waits for the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SPATIAL_FRAMES = 8
TEMPORAL_TRIPLES = 8
SMALLEST = 24  # pixels: below that the third wavelet band is empty
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def as_clips(clips: Tensor | np.ndarray) -> Tensor:
    """``[N, T, H, W, 3]``, uint8 or floating, where it was. Raises ``ValueError`` for another shape, dtype, or frames below 24 pixels."""
    tensor = torch.as_tensor(clips).detach()
    shape = list(tensor.shape)
    if tensor.dim() != 5 or shape[-1] != 3 or 0 in shape:
        raise ValueError(f"frames are [T, H, W, 3], not {shape[1:]}")
    if min(shape[2:4]) < SMALLEST:
        raise ValueError(f"frames are at least {SMALLEST} pixels high and wide, not {shape[2]}x{shape[3]}")
    if not tensor.is_floating_point() and tensor.dtype != torch.uint8:
        raise ValueError(f"frames are uint8 or floating, not {tensor.dtype}")
    return tensor


def spatial_places(frames: int) -> list[int]:
    """Which frames of a clip the spatial metrics look at."""
    return picked(frames, SPATIAL_FRAMES)


def triple_places(frames: int) -> list[int]:
    """The first frame of each triple that the temporal metrics look at; none below three frames."""
    return picked(frames - 2, TEMPORAL_TRIPLES) if frames >= 3 else []


def picked(count: int, most: int) -> list[int]:
    """Up to ``most`` places in ``range(count)``, evenly spread, the ends among them."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def to_float(frames: Tensor) -> Tensor:
    """float32 in 0..1: what is not finite counts as black, values beyond the range are cut off, as a screen shows them."""
    if frames.dtype == torch.uint8:
        return frames.to(torch.float32).div_(255)
    return torch.nan_to_num(frames.to(torch.float32), nan=0.0, posinf=0.0, neginf=0.0).clamp_(0, 1)


def to_luma(colour: Tensor) -> Tensor:
    """``[..., H, W, 3]`` to ``[..., H, W]``. Multiplied and added one by one: a matrix product may run in TF32 on a GPU."""
    red, green, blue = LUMA
    return (colour[..., 0] * red).add_(colour[..., 1], alpha=green).add_(colour[..., 2], alpha=blue)


def pooled(image: Tensor) -> Tensor:
    """Mean over 2x2 pixels; an odd last row or column is left out."""
    down, across = (size // 2 * 2 for size in image.shape[-2:])
    rows = image[..., 0:down:2, :] + image[..., 1:down:2, :]
    return (rows[..., 0:across:2] + rows[..., 1:across:2]).mul_(0.25)


def finite_share(clips: Tensor) -> Tensor:
    """Share of finite values, ``[N]`` in 0..1, over all frames."""
    if not clips.is_floating_point():
        return torch.ones(len(clips), device=clips.device)
    return torch.isfinite(clips).flatten(1).float().mean(dim=1)


def repeated_share(clips: Tensor) -> Tensor:
    """Share of neighbouring frames that are the same to within half an 8-bit level, ``[N]`` in 0..1, looked at on every fourth row."""
    if clips.shape[1] < 2:
        return torch.zeros(len(clips), device=clips.device)
    rows = clips[:, :, ::4]
    if clips.dtype == torch.uint8:
        same = (rows[:, 1:] == rows[:, :-1]).flatten(2).all(dim=2)
    else:
        rows = to_float(rows)
        same = ((rows[:, 1:] - rows[:, :-1]).abs() <= 0.5 / 255).flatten(2).all(dim=2)
    return same.float().mean(dim=1)
