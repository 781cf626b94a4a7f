"""Detail and grain in single frames. Every function takes luma ``[B, H, W]``, float32 in 0..1, and gives ``[B]``, one number per frame.

Sums of shifted slices stand where one would write convolutions: a GPU may do those in TF32, at a thousandth of relative error, and the
panel is to give the same numbers on every device.
"""

from __future__ import annotations

from functools import lru_cache

import pywt
import torch
from torch import Tensor

WAVELET = "db2"
CRETE_SIZE = 11  # pixels, as skimage.measure.blur_effect
TILE = 16  # coefficients; the noise is estimated tile by tile


def blur_effect(luma: Tensor) -> Tensor:
    """1 minus the blur effect of Crete et al., "The blur effect" (SPIE 6492, 2007): 0 (blurred) to 1 (sharp).

    Per direction, S = |Sobel| of the frame and B = |Sobel| of the frame after a box of 11 pixels; the effect is 1 - sum max(0, S - B) /
    sum S, the worse direction counts. The values are those of ``skimage.measure.blur_effect``. Fooled by noise, which reads as sharpness,
    and by clipping; blind to contrast. A flat frame gives 0.
    """
    return torch.minimum(_kept_by_a_box(luma, -1), _kept_by_a_box(luma, -2))


def _kept_by_a_box(luma: Tensor, dim: int) -> Tensor:
    """sum max(0, S - B) / sum S along ``dim``, over the part of the frame that skimage looks at (two pixels off one end, one off the
    other)."""
    other = -1 if dim == -2 else -2
    size, half = luma.shape[dim], CRETE_SIZE // 2
    smooth = smoothed(luma, other)
    step = difference(mirrored(smooth.narrow(other, 1, smooth.shape[other] - 1), dim, half, half), dim)
    sharp = step.narrow(dim, half + 1, size - 3).abs()
    soft = (window_sum(step, dim, CRETE_SIZE) / CRETE_SIZE).narrow(dim, 1, size - 3).abs()
    total, gone = sharp.mean(dim=(-2, -1)), (sharp - soft).clamp_min(0).mean(dim=(-2, -1))
    # Below a step of 1e-5 (1/400 of an 8-bit level) a frame is flat and the ratio is noise over noise.
    return torch.where(total > 1e-5, gone / total.clamp_min(1e-5), torch.zeros_like(total))


def bands(luma: Tensor, levels: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    """db2 detail coefficients (horizontal edges, vertical edges, diagonal), finest band first, as ``pywt.wavedec2`` has them in
    ``symmetric`` mode."""
    found, rest = [], luma
    for _ in range(levels):
        low, high = wavelet_step(rest, -2)
        rest, vertical = wavelet_step(low, -1)
        horizontal, diagonal = wavelet_step(high, -1)
        found.append((horizontal, vertical, diagonal))
    return found


def band_energy(band: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean squared coefficient over the three directions. The second band's over the third's falls with blur (Vu and Chandler's FISH, 2012,
    weighs all bands instead); of two bands neither knows contrast, and without the finest they hardly know grain."""
    return torch.stack([detail.square().mean(dim=(-2, -1)) for detail in band]).mean(dim=0)


def noise_deviation(diagonal: Tensor) -> Tensor:
    """Deviation of the noise in units of luma, from the finest diagonal band: median |d| / 0.6745 (Donoho and Johnstone 1994) in tiles of
    16x16 coefficients, of which the lower quartile is taken, so that texture in most of a frame does not pass for noise. Fooled by texture
    everywhere and by frames that are clipped in more than a quarter of their tiles; blur takes noise away, too."""
    down, across = (min(TILE, size) for size in diagonal.shape[-2:])
    tiles = diagonal.abs().unfold(-2, down, down).unfold(-2, across, across).flatten(-2).flatten(1, 2)
    return torch.quantile(tiles.median(dim=-1).values, 0.25, dim=-1) / 0.6745


@lru_cache(maxsize=1)
def wavelet_filters() -> tuple[list[float], list[float]]:
    wavelet = pywt.Wavelet(WAVELET)
    return wavelet.dec_lo, wavelet.dec_hi


def wavelet_step(image: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(low, high) along ``dim``, half as long: ``pywt.dwt`` in mode ``symmetric``."""
    filters = wavelet_filters()
    taps, size = len(filters[0]), image.shape[dim]
    padded = mirrored(image, dim, taps - 2, taps - 1)
    count = (size + taps - 1) // 2
    every_other = [slice(None)] * image.dim()
    every_other[dim] = slice(None, None, 2)
    parts = [padded.narrow(dim, taps - 1 - tap, 2 * count - 1)[tuple(every_other)] for tap in range(taps)]
    low, high = (weighted(kernel, parts) for kernel in filters)
    return low, high


def weighted(weights: list[float], parts: list[Tensor]) -> Tensor:
    total = parts[0] * weights[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        total = total.add_(part, alpha=weight)
    return total


def mirrored(image: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Longer along ``dim`` by its mirror image, the border pixel repeated: c b a | a b c | c b a."""
    size = image.shape[dim]
    return torch.cat(
        [image.narrow(dim, 0, before).flip(dim), image, image.narrow(dim, size - after, after).flip(dim)], dim=dim
    )


def difference(image: Tensor, dim: int) -> Tensor:
    """Half the difference of the two neighbours, two shorter."""
    size = image.shape[dim]
    return (image.narrow(dim, 2, size - 2) - image.narrow(dim, 0, size - 2)).mul_(0.5)


def smoothed(image: Tensor, dim: int) -> Tensor:
    """[1 2 1] / 4 along ``dim``, two shorter."""
    size = image.shape[dim]
    total = image.narrow(dim, 0, size - 2) + image.narrow(dim, 2, size - 2)
    return total.add_(image.narrow(dim, 1, size - 2), alpha=2).mul_(0.25)


def window_sum(image: Tensor, dim: int, width: int) -> Tensor:
    """Sum over windows of ``width``, in a few additions of sums that double in length; no running sum, whose errors would pile up."""
    parts: list[tuple[int, Tensor]] = [(1, image)]
    while parts[-1][0] * 2 <= width:
        length, one = parts[-1]
        count = one.shape[dim] - length
        parts.append((2 * length, one.narrow(dim, 0, count) + one.narrow(dim, length, count)))
    out = image.shape[dim] - width + 1
    total, done = None, 0
    for length, one in reversed(parts):
        if done + length <= width:
            part = one.narrow(dim, done, out)
            total = part if total is None else total + part
            done += length
    return total


def window_range(image: Tensor, dim: int, width: int) -> Tensor:
    """Largest minus smallest value in windows of ``width`` along ``dim``, ``width - 1`` shorter."""
    return _largest(image, dim, width) + _largest(-image, dim, width)


def _largest(image: Tensor, dim: int, width: int) -> Tensor:
    have = 1
    while have < width:
        step = min(have, width - have)
        count = image.shape[dim] - step
        image = torch.maximum(image.narrow(dim, 0, count), image.narrow(dim, step, count))
        have += step
    return image
