"""How steep edges are: the panel's best sense of blur. Luma ``[B, H, W]``, float32 in 0..1, to one number per frame ``[B]``.

Along rows and along columns, the slope d (half the difference of the two neighbours) and the range r of a window of 7 pixels around it,
after a light smoothing. ``sum d^3 / sum d^2 r`` is the slope of edges over the range they cross, where strong edges count most: the
inverse of an edge's width, in 1/pixels. The idea of edge width as blur is Marziliano et al.'s (ICIP 2002); weighing instead of finding
edges is ours.

Numerator and denominator scale alike: blind to contrast and brightness. The smoothing and the weights keep noise out up to some 10 levels
of 255. Clipping makes edges steeper; a picture of nothing but fine texture has the texture's own slope.
"""

from __future__ import annotations

from torch import Tensor

from cogflow.sharpness.spatial import difference, smoothed, window_range

WINDOW = 7  # pixels
LIGHT, HEAVY = 1, 3  # passes of [1 2 1] / 4
FLAT = 0.02  # 1/pixels, the slope said of a frame without edges
TINY = 1e-12  # of d^2 r, in luma cubed; a frame of 8-bit rounding noise has 1e-9


def log_slopes(luma: Tensor) -> tuple[Tensor, Tensor]:
    """Logs of the mean slope after light and after heavier smoothing, the two directions averaged.

    The first is the channel edge_sharpness. The first minus the second, the channel reblur, is what further smoothing takes away: much
    from sharp edges, little from soft ones. Content moves it less than either, so that it tells sharp from soft between different clips,
    too. Crete et al. (2007) blur again in the same spirit.
    """
    found, passes = [], 0
    for wanted in (LIGHT, HEAVY):
        while passes < wanted:
            luma, passes = smoothed(smoothed(luma, -2), -1), passes + 1
        found.append((_log_slope(luma, -2) + _log_slope(luma, -1)) / 2)
    return found[0], found[1]


def _log_slope(luma: Tensor, dim: int) -> Tensor:
    cut = WINDOW // 2 - 1
    slope = difference(luma, dim)
    slope = slope.narrow(dim, cut, slope.shape[dim] - 2 * cut).abs()
    reach = window_range(luma, dim, WINDOW)
    weight = slope.square()
    steep, whole = (weight * slope).mean(dim=(-2, -1)), (weight * reach).mean(dim=(-2, -1))
    return ((steep + FLAT * TINY) / (whole + TINY)).log()
