"""Noise models: measured deviations of the metrics' changes when nothing is wrong.

Every verdict divides a change by these deviations.

:data:`METRIC_NOISE` is for :func:`cogflow.sharpness.compare`. It was measured on 29 contents (19 photographs, panned,
and 10 windows of 3 videos, shipped by Python packages) at 64x96 and 96x144, every second one at 256x384, 9 frames, two
or three takes of each, with ``python -m benchmarks.separation`` (its result ``noise``). The values are rounded to
between those of the three sizes, for blur metrics to near the largest; ``clipped`` is set by hand. Each is the 95 %
quantile of the absolute change over 1.96: the deviation of a normal change, wide where the tails are.

:data:`WATCH_NOISE` is for :class:`cogflow.sharpness.QualityWatch`. It was measured on contents and simulated with
``python -m benchmarks.watch``, which prints detections and false alarms with their counts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricNoise:
    """Deviations of a metric's change (:func:`cogflow.sharpness.change`) with nothing wrong.

    ``rounding``: the same frames, every second value off by one 8-bit level; ``variants``: the same content with
    another crop, zoom, brightness and time; ``contents``: other contents.
    """

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
"""Deviations by metric; the last four are the derived changes (:data:`cogflow.sharpness.verdict.DERIVED`)."""


@dataclass(frozen=True)
class PromptNoise:
    """Noise of a tested metric of one prompt: its change while nothing is wrong.

    * ``contents``: deviation of its value over contents;
    * ``variants``: deviation of its change between two takes of one content;
    * ``least_shift``: the smallest shift of all prompts together that is worth an alarm, however certain it is;
    * ``stricter``: added to the limits. Blur, which the watch is made for, gets the larger part of the false alarms
      that all metrics together are allowed.
    """

    contents: float
    variants: float
    least_shift: float
    stricter: float = 0.5


@dataclass(frozen=True)
class WatchNoise:
    """The noise model and the limits of the quality watch. ``prompt_noise``: by tested metric (measured or derived).

    The composite ``blur`` is in units of what a Gaussian of sigma 1 pixel takes from real clips (median): -1. A clip
    that is soft already has less to lose: ``gain`` is the line (value at 0, slope) of what such a blur takes over the
    clip's own composite, within :data:`GAIN_BOUNDS`. The other settings:

    * ``unit``: the change of the composite, as :mod:`cogflow.sharpness.verdict` computes it, by a Gaussian of sigma 1;
    * ``share``: deviation expected between the base model's sample and a finetuned model's, as a share of the deviation
      over contents;
    * ``spread_df``: prompts that the expected deviation counts for, before it is corrected by the spread of all metrics
      together;
    * ``prior_df``: prompts that the corrected deviation counts for in one metric's deviation;
    * ``newest``: weight of the newest validation in the smoothed change;
    * ``warning``, ``alarm``: limits, as normal scores.
    """

    prompt_noise: dict[str, PromptNoise]
    unit: float = 0.122
    gain: tuple[float, float] = (3.05, 0.44)
    share: float = 0.4
    spread_df: float = 3.0
    prior_df: float = 40.0
    newest: float = 0.4
    warning: float = 2.8
    alarm: float = 3.3


GAIN_BOUNDS = (0.3, 2.0)
"""Bounds of the gain of a prompt."""
WATCH_NOISE = WatchNoise(
    prompt_noise={
        "blur": PromptNoise(0.88, 0.12, 0.12, 0.0),
        "sharp": PromptNoise(0.86, 0.12, 0.15),
        "smear": PromptNoise(0.62, 0.16, 0.12),
        "contrast": PromptNoise(0.43, 0.18, 0.10),
        "veil": PromptNoise(0.11, 0.06, 0.03),
        "grain": PromptNoise(0.47, 0.07, 0.15),
        "saturation": PromptNoise(0.80, 0.08, 0.15),
        "clipped": PromptNoise(0.08, 0.05, 0.05),
        "motion": PromptNoise(1.06, 0.38, 0.2, 0.9),
        "artefacts": PromptNoise(0.15, 0.05, 0.05),
    },
)
"""Measured on 25 contents of 480x720, except artefacts: frames of real clips have none (deviation 0.004), samples of a
small model have some (0.15)."""
