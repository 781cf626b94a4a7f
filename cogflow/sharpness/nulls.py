"""How far the channels move with nothing wrong, measured.

On 29 contents (19 photographs, panned, and 10 windows of 3 videos, as Python packages ship them) at 64x96 and 96x144, every other one at
256x384, 9 frames, two or three takes of each, by ``stage=benchmark stage.what=separation``: the figures there under ``nulls``, rounded to
between the three sizes' values, for blur channels to near the largest; ``clipped`` is set by hand. Each is the 95 % quantile of the
absolute change over 1.96: the deviation of a normal change, wide where the tails are. A finetune's samples have drifts of their own, which
the watch learns (:mod:`cogflow.sharpness.watch`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Null:
    """Deviations of a channel's change (:func:`cogflow.sharpness.change`). ``rounding``: the same frames, every second value one 8-bit
    level off; ``variants``: the same content, another crop, zoom, brightness and time; ``contents``: other contents."""

    rounding: float
    variants: float
    contents: float


NULLS: dict[str, Null] = {
    "edge_sharpness": Null(0.0002, 0.018, 0.16),
    "reblur": Null(0.0002, 0.017, 0.06),
    "wavelet_ratio": Null(0.0015, 0.154, 0.58),
    "blur_effect": Null(0.005, 0.041, 0.25),
    "detail": Null(0.015, 0.31, 1.85),
    "contrast": Null(0.0005, 0.105, 0.70),
    "brightness": Null(0.0001, 0.060, 0.15),
    "haze": Null(0.0002, 0.044, 0.17),
    "saturation": Null(0.012, 0.100, 0.97),
    "clipped": Null(0.006, 0.060, 0.15),
    "grain": Null(0.17, 0.25, 1.0),
    "motion": Null(0.003, 0.45, 2.3),
    "temporal_sharpness": Null(0.024, 0.14, 0.9),
    "repeated": Null(0.010, 0.064, 0.13),
    "artefacts": Null(0.003, 0.065, 0.065),
    "finite": Null(1e-6, 1e-6, 1e-6),
    "blur": Null(0.0002, 0.012, 0.10),
    "sharp": Null(0.0007, 0.012, 0.10),
    "smear": Null(0.024, 0.14, 0.95),
    "veil": Null(0.0002, 0.037, 0.165),
}
"""Channel to its deviations; the last four are the numbers that :func:`cogflow.sharpness.verdict.with_derived` works out."""
