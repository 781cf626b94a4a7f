"""What the panel looks at: clips of any dtype and place become float32 luma and colour on the device they are on.

Spatial metrics look at up to :data:`SPATIAL_FRAMES` frames, evenly spread; temporal ones at up to :data:`TEMPORAL_TRIPLES` triples of
neighbouring frames. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SPATIAL_FRAMES = 12
TEMPORAL_TRIPLES = 12
SMALLEST = 24  # pixels: below that the third wavelet band is empty
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Views:
    """float32 in 0..1. ``colour`` ``[N, F, H, W, 3]``, ``luma`` ``[N, F, H, W]`` (the frames picked), ``triples`` ``[N, P, 3, H, W]``
    luma of neighbouring frames (P = 0 below three frames), ``finite`` ``[N]`` and ``repeated`` ``[N]`` shares."""

    colour: Tensor
    luma: Tensor
    triples: Tensor
    finite: Tensor
    repeated: Tensor


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


def views(clips: Tensor) -> Views:
    """Pick frames of ``clips`` and turn them into numbers: what is not finite counts as black, and values beyond 0..1 are cut off."""
    frames = clips.shape[1]
    colour = to_float(clips[:, picked(frames, SPATIAL_FRAMES)])
    # The triples share most of their frames when a clip is short: each frame is turned into luma once.
    starts = picked(frames - 2, TEMPORAL_TRIPLES) if frames >= 3 else []
    wanted = sorted({start + step for start in starts for step in range(3)})
    if wanted:
        lumas = to_luma(to_float(clips[:, wanted]))
        place = {frame: index for index, frame in enumerate(wanted)}
        triples = lumas[:, [[place[start + step] for step in range(3)] for start in starts]]
    else:
        triples = colour.new_zeros((len(clips), 0, 3, *clips.shape[2:4]))
    return Views(colour, to_luma(colour), triples, finite_share(clips), repeated_share(clips))


def picked(count: int, most: int) -> list[int]:
    """Up to ``most`` places in ``range(count)``, evenly spread, the ends among them."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def to_float(frames: Tensor) -> Tensor:
    if frames.dtype == torch.uint8:
        return frames.to(torch.float32) / 255
    return torch.nan_to_num(frames.to(torch.float32), nan=0.0, posinf=0.0, neginf=0.0).clamp(0, 1)


def to_luma(colour: Tensor) -> Tensor:
    """``[..., H, W, 3]`` to ``[..., H, W]``. Multiplied and added one by one: a matrix product may run in TF32 on a GPU."""
    red, green, blue = LUMA
    return colour[..., 0] * red + colour[..., 1] * green + colour[..., 2] * blue


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
