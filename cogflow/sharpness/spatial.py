"""Blur and grain in single frames. Every function takes luma ``[B, H, W]``, float32 in 0..1, and gives ``[B]``."""

from __future__ import annotations

from functools import lru_cache

import pywt
import torch
from torch import Tensor
from torch.nn import functional

WAVELET = "db2"
CRETE_SIZE = 11  # pixels, as skimage.measure.blur_effect
TINY = 1e-12


@lru_cache(maxsize=1)
def filters() -> tuple[list[float], list[float]]:
    wavelet = pywt.Wavelet(WAVELET)
    return wavelet.dec_lo, wavelet.dec_hi


def split(image: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """One step of the wavelet transform along ``dim``: (low, high), as ``pywt.dwt`` in its mode ``symmetric``.

    Sums of shifted slices instead of a convolution, which a GPU may do in TF32 at a thousandth of relative error.
    """
    low, high = filters()
    taps, size = len(low), image.shape[dim]
    places = list(range(taps - 2))[::-1] + list(range(size)) + list(range(size - 1, size - taps, -1))
    padded = image.index_select(dim, torch.tensor(places, device=image.device))
    count = (size + taps - 1) // 2
    slices = [padded.narrow(dim, taps - 1 - tap, 2 * count - 1) for tap in range(taps)]
    step = [slice(None)] * image.dim()
    step[dim] = slice(None, None, 2)
    slices = [one[tuple(step)] for one in slices]
    return tuple(sum(value * one for value, one in zip(kernel, slices, strict=True)) for kernel in (low, high))  # type: ignore[return-value]


def bands(luma: Tensor, levels: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Detail coefficients (horizontal edges, vertical edges, diagonal), finest band first, as ``pywt.wavedec2`` has them."""
    found = []
    rest = luma
    for _ in range(levels):
        low, high = split(rest, -2)
        rest, vertical = split(low, -1)
        horizontal, diagonal = split(high, -1)
        found.append((horizontal, vertical, diagonal))
    return found


def band_energy(band: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean squared coefficient over the three directions."""
    return torch.stack([detail.square().mean(dim=(-2, -1)) for detail in band]).mean(dim=0)


def noise_deviation(diagonal: Tensor) -> Tensor:
    """Deviation of the noise, in units of luma, from the finest diagonal band: the median of \\|d\\| / 0.6745 in tiles of 16x16 coefficients, of which
    the lower quartile is taken, so that texture in most of the frame does not pass for noise."""
    size = min(16, *diagonal.shape[-2:])
    tiles = diagonal.abs().unfold(-2, size, size).unfold(-2, size, size).flatten(-2).flatten(1, 2)
    medians = tiles.median(dim=-1).values
    return torch.quantile(medians, 0.25, dim=-1) / 0.6745


def blur_effect(luma: Tensor) -> Tensor:
    """1 - the blur effect of Crete et al. 2007, as ``skimage.measure.blur_effect``: 0 (blurred) to 1 (sharp)."""
    return 1 - torch.maximum(_crete(luma, -1), _crete(luma, -2))


def _crete(luma: Tensor, dim: int) -> Tensor:
    sharp = _sobel(luma, dim)[..., 2:-1, 2:-1]
    soft = _sobel(_uniform(luma, dim), dim)[..., 2:-1, 2:-1]
    total = sharp.mean(dim=(-2, -1))
    lost = (sharp - soft).clamp_min(0).mean(dim=(-2, -1))
    return torch.where(total > 1e-5, (total - lost) / total.clamp_min(1e-5), torch.ones_like(total))


def _reflect(image: Tensor, dim: int, width: int) -> Tensor:
    size = image.shape[dim]
    places = list(range(width))[::-1] + list(range(size)) + list(range(size - 1, size - 1 - width, -1))
    return image.index_select(dim, torch.tensor(places, device=image.device))


def _uniform(image: Tensor, dim: int) -> Tensor:
    kernel = (CRETE_SIZE, 1) if dim == -2 else (1, CRETE_SIZE)
    return functional.avg_pool2d(_reflect(image, dim, CRETE_SIZE // 2)[:, None], kernel, stride=1)[:, 0]


def _sobel(image: Tensor, dim: int) -> Tensor:
    """|Sobel| along ``dim``; the frame of two pixels that is cut off later makes the boundary of no matter."""
    other = -1 if dim == -2 else -2
    smooth = _shifted(image, other, -1) * 0.25 + image * 0.5 + _shifted(image, other, 1) * 0.25
    return ((_shifted(smooth, dim, 1) - _shifted(smooth, dim, -1)) / 2).abs()


def _shifted(image: Tensor, dim: int, by: int) -> Tensor:
    return torch.roll(image, -by, dims=dim)


def edge_sharpness(luma: Tensor) -> Tensor:
    """Slope of the strong edges over the local range they cross, 1 / width in pixels, after a light smoothing."""
    soft = binomial(binomial(luma))
    across = (soft[..., 1:-1, 2:] - soft[..., 1:-1, :-2]) / 2
    down = (soft[..., 2:, 1:-1] - soft[..., :-2, 1:-1]) / 2
    slope = (across.square() + down.square()).sqrt()
    top = functional.max_pool2d(soft[:, None], 9, stride=1, padding=4)[:, 0]
    bottom = -functional.max_pool2d(-soft[:, None], 9, stride=1, padding=4)[:, 0]
    reach = (top - bottom)[..., 1:-1, 1:-1]
    weight = slope.square()
    return (weight * slope).mean(dim=(-2, -1)) / (weight * reach).mean(dim=(-2, -1)).clamp_min(TINY)


def binomial(image: Tensor) -> Tensor:
    """Smoothed by [1 2 1] / 4 both ways; one pixel smaller on each side."""
    image = image[..., :-2, :] * 0.25 + image[..., 1:-1, :] * 0.5 + image[..., 2:, :] * 0.25
    return image[..., :-2] * 0.25 + image[..., 1:-1] * 0.5 + image[..., 2:] * 0.25
