"""Findings in words: the likely causes of a defect by the rung where it enters, with the settings that matter there."""

from __future__ import annotations

import math
from collections.abc import Mapping

from cogflow.ladder.rung import Rung
from cogflow.sharpness.defects import DEFECTS
from cogflow.sharpness.metrics import METRICS
from cogflow.sharpness.quality_watch import UNCHANGED
from cogflow.sharpness.verdict import Finding

_FACTOR = "another scaling_factor than the VAE was made with"
_CACHE_FACTOR = "latents prepared with " + _FACTOR
_RATE = "learning rate too high"
_LOST_WEIGHTS = "learning rate too high: the weights are lost"
_LONG = "trained too long on too few clips"
_EMA = "EMA weights that lag behind (ema_decay)"
_FRAME_RATE = "data.fps higher than the sources' frame rate"
_RANGE = "limited range read as full range"
_OTHER_VAE = "VAE weights that do not belong to this model"
_VAE_DTYPE = "VAE precision (sampling.vae_dtype)"
_VAE_OVERFLOW = "an overflow of the VAE in fp16 (sampling.vae_dtype)"
_GUIDANCE = "sampling.guidance_scale too high"
_DTYPE_RANGE = "values beyond the dtype's range"
_STILL_CLIPS = "clips without motion among the data"

ANY_OTHER = ""
"""Key of the causes of all defects that a rung does not list."""
_CAUSES: Mapping[Rung, Mapping[str, tuple[str, ...]]] = {
    Rung.SOURCE: {
        "soft": ("clips scaled up from a smaller size", "out of focus or heavily compressed sources"),
        "grainy": ("noisy or strongly compressed sources",),
        "artefacts": ("compression blocks in the sources",),
        "smeared": ("frames blended by a frame-rate conversion",),
        "identical": ("frames repeated by a frame-rate conversion",),
        ANY_OTHER: ("the sources themselves",),
    },
    Rung.CLIP: {
        "soft": ("clips scaled up: data.height and data.width are larger than the sources", "data.resize"),
        "smeared": (_FRAME_RATE,),
        "identical": (_FRAME_RATE, "a broken decoder"),
        "washed_out": (_RANGE,),
        "hazy": (_RANGE,),
        ANY_OTHER: ("decoding, resizing or cropping in the loader",),
    },
    Rung.ROUNDTRIP: {
        "soft": (_OTHER_VAE, _VAE_DTYPE, _FACTOR, "tiling"),
        "washed_out": (_FACTOR, _OTHER_VAE),
        "hazy": (_FACTOR, _OTHER_VAE),
        "artefacts": (_FACTOR, "tiling (sampling.vae_tiling)", _VAE_DTYPE),
        "over_sharpened": (_FACTOR,),
        "non_finite": (_VAE_OVERFLOW,),
        "black": (_VAE_OVERFLOW,),
        ANY_OTHER: ("the VAE: weights, scaling_factor, precision, tiling",),
    },
    Rung.BASE: {
        "soft": (
            "another schedule than in training (snr_shift_scale)",
            "too few steps (sampling.steps)",
            "the base model itself",
        ),
        "washed_out": (_FACTOR, "another schedule than in training (snr_shift_scale, rescale_betas_zero_snr)"),
        "saturated": (_GUIDANCE,),
        "over_sharpened": (_GUIDANCE,),
        "non_finite": ("the dtype (model.dtype)",),
        "black": ("the dtype (model.dtype, sampling.vae_dtype)",),
        ANY_OTHER: (
            "the schedule (snr_shift_scale, prediction_type, timestep_spacing)",
            "the dtype",
            "the base model itself",
        ),
    },
    Rung.TUNED: {
        "soft": (_RATE, "blurred or scaled-up clips among the data", _EMA, _LONG),
        "over_sharpened": (_RATE, "over-sharpened clips among the data", _CACHE_FACTOR),
        "washed_out": (_CACHE_FACTOR, _RATE, _EMA),
        "hazy": (_CACHE_FACTOR, "hazy clips among the data", _RATE),
        "smeared": (_RATE, "clips with blended frames among the data", _LONG),
        "grainy": (_RATE, _CACHE_FACTOR, "noisy clips among the data"),
        "saturated": (
            _RATE,
            "text_dropout too low for the guidance_scale in use",
            "saturated clips among the data",
        ),
        "frozen": (_LONG, _STILL_CLIPS, _RATE),
        "identical": (_LONG, _STILL_CLIPS),
        "black": (_LOST_WEIGHTS, _DTYPE_RANGE),
        "non_finite": (_LOST_WEIGHTS, _DTYPE_RANGE),
        "artefacts": (_RATE, _CACHE_FACTOR, "compression blocks in the clips"),
        UNCHANGED: (
            "the samples are not made with the trained weights",
            "learning rate too low",
            _EMA,
            "frozen parameters",
        ),
        ANY_OTHER: (_RATE, "the clips themselves", _EMA),
    },
    Rung.EXPORTED: {
        "soft": (
            "the export's VAE or scheduler config differs from training's",
            "weights lost or mixed up in conversion",
            "dtype",
        ),
        "washed_out": ("scaling_factor in the export's VAE config", "the export's scheduler config"),
        ANY_OTHER: (
            "config of VAE or scheduler in the export",
            "weights lost or mixed up in conversion",
            "dtype of the export",
        ),
    },
}
_WITHOUT_SIZE = ("identical", "black", "non_finite", UNCHANGED)
"""Defects whose size says nothing."""
_UNCHANGED_MEANING = "the samples equal those from before the first step to the bit"
_PERCENT_DIFFERENCES = ("wavelet_ratio", "motion", "temporal_sharpness", "detail")
"""Metrics that are logs themselves: their difference is a ratio, too."""
GAUSSIAN = ((0.0, 0.0), (0.8, -0.35), (1.0, -0.55), (1.5, -1.1))
"""Sigma in pixels, and the median change of wavelet_ratio it makes on real clips of 480x720."""


def likely_causes(defect: str, rung: Rung) -> tuple[str, ...]:
    """Return the causes of ``defect`` (:data:`cogflow.sharpness.DEFECTS`) that enters at ``rung``, the likeliest first.

    A defect that the rung does not list has the rung's general causes.
    """
    causes = _CAUSES[rung]
    return causes.get(defect, causes[ANY_OTHER])


def describe_finding(finding: Finding, rung: Rung) -> str:
    """Return one sentence: level, defect, rung, meaning, size, since when, and likely causes, the likeliest first."""
    meaning = _UNCHANGED_MEANING if finding.defect == UNCHANGED else DEFECTS.get(finding.defect, finding.defect)
    sentence = f"{finding.level}: {finding.defect.replace('_', ' ')} at rung {rung.value} ({rung.title}): {meaning}"
    if finding.defect not in _WITHOUT_SIZE:
        sentence += f" ({describe_change(finding.metric, finding.size)}, z {finding.z:+.1f})"
    if finding.since is not None:
        sentence += f", since step {finding.since}"
    return f"{sentence}; likely: {', '.join(likely_causes(finding.defect, rung))}"


def describe_change(metric: str, size: float) -> str:
    """Return a metric's change in words: per cent for a log ratio, with the comparable Gaussian blur for
    ``wavelet_ratio``.
    """
    title = metric.replace("_", " ")
    is_ratio = metric in _PERCENT_DIFFERENCES or (metric in METRICS and METRICS[metric].scale == "log")
    if not is_ratio:
        return f"{title} {size:+.3g}"
    text = f"{title} {math.expm1(min(size, 20.0)):+.0%}"
    if metric == "wavelet_ratio" and size < 0:
        text += f", like a Gaussian blur of {gaussian_width(size)}"
    return text


def gaussian_width(size: float) -> str:
    """Return in words the sigma of the Gaussian that changes ``wavelet_ratio`` by ``size`` (below zero)."""
    if size <= GAUSSIAN[-1][1]:
        return f"{GAUSSIAN[-1][0]:g} pixels or more"
    for (narrow, above), (wide, below) in zip(GAUSSIAN, GAUSSIAN[1:], strict=False):
        if size >= below:
            return f"about {narrow + (wide - narrow) * (above - size) / (above - below):.1f} pixels"
    raise ValueError(f"a change of {size} is not finite")
