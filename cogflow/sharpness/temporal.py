"""Motion and smear, from triples of neighbouring frames ``[B, 3, H, W]`` of luma, float32 in 0..1.

With a, b, c the frames of a triple:

* ``motion``: log of mean (c - a)^2 over the variance of luma, of means of 4x4 pixels, which noise and blur move little. 0.7 for frames that
  have nothing to do with each other, falling without end as the picture comes to rest. Blind to contrast and brightness. Ours; a share
  of change, not of speed: texture moving slowly counts as much as large shapes moving fast.
* ``temporal_sharpness``: log of mean (a - 2b + c)^2 over mean (c - a)^2, quick change over slow, of means of 2x2 pixels. 1.1 for noise,
  below 0 for smooth motion; blending a frame with its neighbour averages the quick part away. Ours. Blur in space lowers it, too (what
  is soft changes slowly), noise raises it, and where nothing moves it measures noise.
"""

from __future__ import annotations

from torch import Tensor

from cogflow.sharpness.frames import pooled

FLOOR = 1e-8  # of a mean square: far below that of 8-bit rounding (1.3e-6)


def energies(triples: Tensor) -> dict[str, Tensor]:
    """``slow`` (change over two frames) and ``quick`` (second difference) of 2x2 pixels, ``moved`` (as slow) and ``variance`` (within the
    frames) of 4x4: mean squares, ``[B]`` each."""
    fine = pooled(triples)
    before, now, after = fine.unbind(1)
    coarse = pooled(fine)
    moved = coarse[:, 2] - coarse[:, 0]
    return {
        "slow": (after - before).square().mean(dim=(-2, -1)),
        "quick": (after - 2 * now + before).square().mean(dim=(-2, -1)),
        "moved": moved.square().mean(dim=(-2, -1)),
        "variance": coarse[:, 1].var(dim=(-2, -1), correction=0),
    }


def channels(means: dict[str, Tensor]) -> dict[str, Tensor]:
    """The two channels from the energies' means over a clip's triples."""
    slow, quick, moved, variance = (means[name] + FLOOR for name in ("slow", "quick", "moved", "variance"))
    return {"motion": (moved / variance).log(), "temporal_sharpness": (quick / slow).log()}
