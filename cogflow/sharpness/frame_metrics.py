"""The formulas of the metrics: detail, edges, tone, grain and block artefacts of frames, and motion of frame triples.

Frames are luma ``[B, H, W]`` or colour ``[B, H, W, 3]``, float32 in 0..1; triples are luma ``[B, 3, H, W]``. Each
function gives one number per frame or triple, ``[B]``. :mod:`cogflow.sharpness.metrics` averages them over the frames
of a clip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogflow.sharpness.filters import central_difference, mirror_pad, smooth, window_range, window_sum
from cogflow.sharpness.frames import pool_2x2

EDGE_WINDOW = 7  # pixels
LIGHT_PASSES, HEAVY_PASSES = 1, 3  # passes of [1 2 1] / 4
FLAT_SLOPE = 0.02  # 1/pixels, the slope of a frame without edges
SLOPE_FLOOR = 1e-12  # of d^2 r, in luma cubed; a frame of 8-bit rounding noise has 1e-9
CRETE_SIZE = 11  # pixels, as in skimage.measure.blur_effect
NOISE_TILE = 16  # coefficients; the noise is estimated tile by tile
NEAR_END = 1.5 / 255  # within one 8-bit level of black or white
DARK_SHARE = 0.05
BLOCK_PERIOD = 8  # pixels that one latent pixel becomes; a period of 16 (one token) has the same borders
STEP_FLOOR = 1e-4  # of a mean step of luma: a fortieth of an 8-bit level
MOTION_FLOOR = 1e-8  # of a mean square: far below that of 8-bit rounding (1.3e-6)

# Edges and detail


def edge_log_slopes(luma: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logs of the mean edge slope after light and after heavy smoothing, the two directions averaged.

    Along rows and columns, d is the slope (half the difference of the two neighbours) and r the range of a window of 7
    pixels around it, after light smoothing. ``sum d^3 / sum d^2 r`` is the slope of edges over the range they cross, in
    1/pixels: the inverse of an edge's width. Strong edges count most. Edge width as a measure of blur is from
    Marziliano et al. (ICIP 2002); the weighting, which replaces edge detection, is ours.

    The first value is the metric edge_sharpness. The first minus the second is the metric reblur: what further
    smoothing takes away, much from sharp edges and little from soft ones. Content moves it less than either slope, so
    it separates sharp from soft between different clips, too. Crete et al. (2007) blur again for the same reason.

    Numerator and denominator scale alike, so the ratio ignores contrast and brightness. Smoothing and weights suppress
    noise up to about 10 levels of 255. Fooled by clipping, which makes edges steeper, and by a picture of fine texture
    only.
    """
    slopes, passes = [], 0
    for wanted in (LIGHT_PASSES, HEAVY_PASSES):
        while passes < wanted:
            luma, passes = smooth(smooth(luma, -2), -1), passes + 1
        slopes.append((edge_log_slope(luma, -2) + edge_log_slope(luma, -1)) / 2)
    return slopes[0], slopes[1]


def edge_log_slope(luma: Tensor, dim: int) -> Tensor:
    """Return the log of ``sum d^3 / sum d^2 r`` along ``dim`` (:func:`edge_log_slopes`)."""
    cut = EDGE_WINDOW // 2 - 1
    slope = central_difference(luma, dim)
    slope = slope.narrow(dim, cut, slope.shape[dim] - 2 * cut).abs()
    reach = window_range(luma, dim, EDGE_WINDOW)
    weight = slope.square()
    steep, whole = (weight * slope).mean(dim=(-2, -1)), (weight * reach).mean(dim=(-2, -1))
    return ((steep + FLAT_SLOPE * SLOPE_FLOOR) / (whole + SLOPE_FLOOR)).log()


def blur_effect(luma: Tensor) -> Tensor:
    """Return 1 minus the blur effect of Crete et al., "The blur effect" (SPIE 6492, 2007): 0 (blurred) to 1 (sharp).

    Per direction, S = |Sobel| of the frame and B = |Sobel| of the frame after a box of 11 pixels; the effect is
    1 - sum max(0, S - B) / sum S, and the worse direction counts. The values equal ``skimage.measure.blur_effect``.
    Noise misleads it, because noise reads as sharpness, and so does clipping; it ignores contrast. A flat frame
    gives 0.
    """
    return torch.minimum(_detail_lost_to_box(luma, -1), _detail_lost_to_box(luma, -2))


def _detail_lost_to_box(luma: Tensor, dim: int) -> Tensor:
    """Return sum max(0, S - B) / sum S along ``dim``, over the pixels that skimage uses (two off one end, one off the
    other).
    """
    other = -1 if dim == -2 else -2
    size, half = luma.shape[dim], CRETE_SIZE // 2
    smoothed = smooth(luma, other)
    cropped = smoothed.narrow(other, 1, smoothed.shape[other] - 1)
    step = central_difference(mirror_pad(cropped, dim, half, half), dim)
    sharp = step.narrow(dim, half + 1, size - 3).abs()
    soft = (window_sum(step, dim, CRETE_SIZE) / CRETE_SIZE).narrow(dim, 1, size - 3).abs()
    total, gone = sharp.mean(dim=(-2, -1)), (sharp - soft).clamp_min(0).mean(dim=(-2, -1))
    # Below a step of 1e-5 (1/400 of an 8-bit level) a frame is flat and the ratio is noise over noise.
    return torch.where(total > 1e-5, gone / total.clamp_min(1e-5), torch.zeros_like(total))


def band_energy(band: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the mean squared wavelet coefficient over the three directions.

    The energy of the second band over that of the third falls with blur. Vu and Chandler's FISH (2012) weighs all
    bands; a ratio of two bands ignores contrast, and without the finest band it is nearly independent of grain.
    """
    return torch.stack([detail.square().mean(dim=(-2, -1)) for detail in band]).mean(dim=0)


def noise_deviation(diagonal: Tensor) -> Tensor:
    """Return the deviation of the noise in units of luma, from the finest diagonal band.

    Median |d| / 0.6745 (Donoho and Johnstone 1994) in tiles of 16x16 coefficients. The lower quartile over tiles is
    taken, so that texture in most of a frame does not count as noise. Texture everywhere misleads it, and so do frames
    that are clipped in more than a quarter of their tiles; blur removes noise, too.
    """
    down, across = (min(NOISE_TILE, size) for size in diagonal.shape[-2:])
    tiles = diagonal.abs().unfold(-2, down, down).unfold(-2, across, across).flatten(-2).flatten(1, 2)
    return torch.quantile(tiles.median(dim=-1).values, 0.25, dim=-1) / 0.6745


# Tone: what a wrong VAE scale or guidance changes and blur does not. All but brightness and clipping use means of 4x4
# pixels, which neither blur nor noise moves much: a blurred page of text has not lost contrast in this sense.


def contrast(small: Tensor) -> Tensor:
    """Return the standard deviation of pooled luma within a frame, 0..0.5 (root mean square contrast, Peli 1990).

    Content moves it.
    """
    return small.std(dim=(-2, -1), correction=0)


def brightness(luma: Tensor) -> Tensor:
    """Return the mean luma, 0..1."""
    return luma.mean(dim=(-2, -1))


def dark_level(small: Tensor) -> Tensor:
    """Return the 5 % quantile of pooled luma, 0..1.

    A veil of haze lifts it (the dark channel prior of He et al. 2009, without its local windows). Fooled by a picture
    that is brighter as a whole, or has nothing dark in it.
    """
    return torch.quantile(small.flatten(-2), DARK_SHARE, dim=-1)


def saturation(red: Tensor, blue: Tensor, luma: Tensor) -> Tensor:
    """Return the root mean square of the pooled colour differences red - luma and blue - luma, 0 (grey) to 0.6.

    It follows contrast, because colours fade with contrast.
    """
    return (((red - luma).square() + (blue - luma).square()).mean(dim=(-2, -1)) / 2).sqrt()


def clipped(colour: Tensor) -> Tensor:
    """Return the share of pixels with a colour component within one 8-bit level of its ends, 0..1.

    Fooled by night skies and drawings, which have many such pixels by nature.
    """
    return ((colour.amin(dim=-1) <= NEAR_END) | (colour.amax(dim=-1) >= 1 - NEAR_END)).float().mean(dim=(-2, -1))


# Artefacts: what decoders make of latents off their manifold


def block_grid(luma: Tensor) -> Tensor:
    """Return the log ratio of the mean step |x[i + 1] - x[i]| across the borders of 8x8 blocks to that inside them.

    Rows and columns are averaged.

    0 without a grid, positive where blocks do not meet, negative where their borders are smoothed. Steps inside are
    taken at even distances from the border, so that a clip scaled up by 2, whose steps alternate, shows no grid.

    The blockiness of Wang, Bovik and Evans (ICIP 2000), in the pixel domain. It counts from the frame's corner, so it
    misses the grid of frames that were cropped after decoding. Fooled by drawn patterns of the same period, and by JPEG
    or H.264 blocks in training clips.
    """
    logs = []
    for dim, other in ((-2, -1), (-1, -2)):
        size = luma.shape[dim]
        step = (luma.narrow(dim, 1, size - 1) - luma.narrow(dim, 0, size - 1)).abs().mean(dim=other)
        phases = (
            step[..., : step.shape[-1] // BLOCK_PERIOD * BLOCK_PERIOD].unflatten(-1, (-1, BLOCK_PERIOD)).mean(dim=-2)
        )
        inside = phases[..., 1 : BLOCK_PERIOD - 1 : 2].mean(dim=-1)
        logs.append(((phases[..., BLOCK_PERIOD - 1] + STEP_FLOOR) / (inside + STEP_FLOOR)).log())
    return torch.stack(logs).mean(dim=0)


# Motion: a, b, c are the frames of a triple


def temporal_energies(triples: Tensor) -> dict[str, Tensor]:
    """Return mean squares of each triple, ``[B]`` each.

    ``slow`` (c - a) and ``quick`` (a - 2b + c) of means of 2x2 pixels; ``moved`` (c - a) and ``variance`` (of b) of
    means of 4x4 pixels.
    """
    fine = pool_2x2(triples)
    before, now, after = fine.unbind(1)
    coarse = pool_2x2(fine)
    moved = coarse[:, 2] - coarse[:, 0]
    return {
        "slow": (after - before).square().mean(dim=(-2, -1)),
        "quick": (after - 2 * now + before).square().mean(dim=(-2, -1)),
        "moved": moved.square().mean(dim=(-2, -1)),
        "variance": coarse[:, 1].var(dim=(-2, -1), correction=0),
    }


def temporal_metrics(means: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``motion`` and ``temporal_sharpness`` from the means of :func:`temporal_energies` over a clip's triples.

    * ``motion``: log of mean (c - a)^2 over the variance of luma. 0.7 for unrelated frames, falling without bound as
      the picture comes
      to rest. Ignores contrast and brightness; noise and blur move it little. Ours. It is a share of change and no
      speed: texture that moves slowly counts as much as large shapes that move fast.
    * ``temporal_sharpness``: log of mean (a - 2b + c)^2 over mean (c - a)^2, quick change over slow. 1.1 for noise,
      below 0 for smooth
      motion; blending a frame with its neighbour averages the quick part away. Ours. Fooled by blur in space, which
      lowers it (soft pictures change slowly), by noise, which raises it, and by still pictures, where it measures
      noise.
    """
    slow, quick, moved, variance = (means[name] + MOTION_FLOOR for name in ("slow", "quick", "moved", "variance"))
    return {"motion": (moved / variance).log(), "temporal_sharpness": (quick / slow).log()}
