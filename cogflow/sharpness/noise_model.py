"""How far the channels move with nothing wrong, measured.

On 29 contents (19 photographs, panned, and 10 windows of 3 videos, as Python packages ship them) at 64x96 and 96x144, every other one at
256x384, 9 frames, two or three takes of each, by ``stage=benchmark stage.what=separation``: the figures there under ``nulls``, rounded to
between the three sizes' values, for blur channels to near the largest; ``clipped`` is set by hand. Each is the 95 % quantile of the
absolute change over 1.96: the deviation of a normal change, wide where the tails are. A finetune's samples have drifts of their own, which
the watch learns (:mod:`cogflow.sharpness.quality_watch`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricNoise:
    """Deviations of a channel's change (:func:`cogflow.sharpness.change`). ``rounding``: the same frames, every second value one 8-bit
    level off; ``variants``: the same content, another crop, zoom, brightness and time; ``contents``: other contents."""

    rounding: float
    variants: float
    contents: float


METRIC_NOISE: dict[str, MetricNoise] = {
    "edge_sharpness": MetricNoise(0.0002, 0.018, 0.16),
    "reblur": MetricNoise(0.0002, 0.017, 0.06),
    "wavelet_ratio": MetricNoise(0.0015, 0.154, 0.58),
    "blur_effect": MetricNoise(0.005, 0.041, 0.25),
    "detail": MetricNoise(0.015, 0.31, 1.85),
    "contrast": MetricNoise(0.0005, 0.105, 0.70),
    "brightness": MetricNoise(0.0001, 0.060, 0.15),
    "haze": MetricNoise(0.0002, 0.044, 0.17),
    "saturation": MetricNoise(0.012, 0.100, 0.97),
    "clipped": MetricNoise(0.006, 0.060, 0.15),
    "grain": MetricNoise(0.17, 0.25, 1.0),
    "motion": MetricNoise(0.003, 0.45, 2.3),
    "temporal_sharpness": MetricNoise(0.024, 0.14, 0.9),
    "repeated": MetricNoise(0.010, 0.064, 0.13),
    "artefacts": MetricNoise(0.003, 0.065, 0.065),
    "finite": MetricNoise(1e-6, 1e-6, 1e-6),
    "blur": MetricNoise(0.0002, 0.012, 0.10),
    "sharp": MetricNoise(0.0007, 0.012, 0.10),
    "smear": MetricNoise(0.024, 0.14, 0.95),
    "veil": MetricNoise(0.0002, 0.037, 0.165),
}
"""Channel to its deviations; the last four are the numbers that :func:`cogflow.sharpness.verdict.with_derived` works out."""
