"""Filters along one axis of images: wavelet step, smoothing, differences, windows.

Every filter is a sum of shifted slices instead of a convolution. A GPU may compute convolutions in TF32, with a
relative error of a thousandth; sums of slices give the same numbers on every device. Images are ``[..., H, W]``,
float32; ``dim`` is -1 or -2.
"""

from __future__ import annotations

from functools import lru_cache

import pywt
import torch
from torch import Tensor

WAVELET = "db2"


def wavelet_bands(luma: Tensor, levels: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the db2 detail coefficients of each level, finest level first.

    A level holds (horizontal edges, vertical edges, diagonal), equal to ``pywt.wavedec2`` in ``symmetric`` mode.
    """
    levels_found, approximation = [], luma
    for _ in range(levels):
        low, high = wavelet_step(approximation, -2)
        approximation, vertical = wavelet_step(low, -1)
        horizontal, diagonal = wavelet_step(high, -1)
        levels_found.append((horizontal, vertical, diagonal))
    return levels_found


def wavelet_step(image: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return (low, high) along ``dim``, half as long as ``image``: ``pywt.dwt`` in mode ``symmetric``."""
    filters = wavelet_filters()
    taps, size = len(filters[0]), image.shape[dim]
    padded = mirror_pad(image, dim, taps - 2, taps - 1)
    count = (size + taps - 1) // 2
    every_second = [slice(None)] * image.dim()
    every_second[dim] = slice(None, None, 2)
    shifted = [padded.narrow(dim, taps - 1 - tap, 2 * count - 1)[tuple(every_second)] for tap in range(taps)]
    low, high = (weighted_sum(kernel, shifted) for kernel in filters)
    return low, high


@lru_cache(maxsize=1)
def wavelet_filters() -> tuple[list[float], list[float]]:
    """Return the decomposition filters (low pass, high pass) of :data:`WAVELET`."""
    wavelet = pywt.Wavelet(WAVELET)
    return wavelet.dec_lo, wavelet.dec_hi


def weighted_sum(weights: list[float], images: list[Tensor]) -> Tensor:
    """Return the sum of ``images``, each multiplied by its weight."""
    total = images[0] * weights[0]
    for weight, image in zip(weights[1:], images[1:], strict=True):
        total = total.add_(image, alpha=weight)
    return total


def mirror_pad(image: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Extend ``image`` along ``dim`` by its mirror image. The border pixel is repeated: c b a | a b c | c b a."""
    size = image.shape[dim]
    head, tail = image.narrow(dim, 0, before).flip(dim), image.narrow(dim, size - after, after).flip(dim)
    return torch.cat([head, image, tail], dim=dim)


def central_difference(image: Tensor, dim: int) -> Tensor:
    """Return half the difference of the two neighbours of each pixel; two pixels shorter along ``dim``."""
    size = image.shape[dim]
    return (image.narrow(dim, 2, size - 2) - image.narrow(dim, 0, size - 2)).mul_(0.5)


def smooth(image: Tensor, dim: int) -> Tensor:
    """Apply [1 2 1] / 4 along ``dim``; two pixels shorter."""
    size = image.shape[dim]
    total = image.narrow(dim, 0, size - 2) + image.narrow(dim, 2, size - 2)
    return total.add_(image.narrow(dim, 1, size - 2), alpha=2).mul_(0.25)


def window_sum(image: Tensor, dim: int, width: int) -> Tensor:
    """Return the sum over each window of ``width`` pixels along ``dim``.

    The sum is built from partial sums that double in length. A running sum would accumulate rounding errors.
    """
    partial: list[tuple[int, Tensor]] = [(1, image)]
    while partial[-1][0] * 2 <= width:
        length, sums = partial[-1]
        count = sums.shape[dim] - length
        partial.append((2 * length, sums.narrow(dim, 0, count) + sums.narrow(dim, length, count)))
    output_size = image.shape[dim] - width + 1
    total, done = None, 0
    for length, sums in reversed(partial):
        if done + length <= width:
            part = sums.narrow(dim, done, output_size)
            total = part if total is None else total + part
            done += length
    assert total is not None
    return total


def window_range(image: Tensor, dim: int, width: int) -> Tensor:
    """Return the largest minus the smallest value in each window of ``width`` pixels; ``width - 1`` shorter along
    ``dim``.
    """
    return _window_maximum(image, dim, width) + _window_maximum(-image, dim, width)


def _window_maximum(image: Tensor, dim: int, width: int) -> Tensor:
    covered = 1
    while covered < width:
        step = min(covered, width - covered)
        count = image.shape[dim] - step
        image = torch.maximum(image.narrow(dim, 0, count), image.narrow(dim, step, count))
        covered += step
    return image
