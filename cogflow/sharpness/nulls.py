"""How far the channels move with nothing wrong, measured. First figures; ``stage=benchmark stage.what=separation`` measures them again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Null:
    """Robust standard deviations of a channel's change (:func:`cogflow.sharpness.change`). ``rounding``: the same frames but for 8-bit
    rounding; ``variants``: the same content, another crop, zoom, brightness and time; ``contents``: other contents."""

    rounding: float
    variants: float
    contents: float


NULLS: dict[str, Null] = {
    "wavelet_ratio": Null(0.002, 0.053, 0.6),
    "edge_sharpness": Null(0.002, 0.025, 0.17),
    "reblur": Null(0.001, 0.011, 0.06),
    "detail": Null(0.02, 0.33, 1.9),
    "blur_effect": Null(0.002, 0.022, 0.25),
    "blur": Null(0.001, 0.012, 0.08),
    "sharp": Null(0.001, 0.012, 0.08),
    "smear": Null(0.01, 0.15, 1.0),
    "veil": Null(0.002, 0.039, 0.17),
    "contrast": Null(0.001, 0.135, 0.75),
    "brightness": Null(0.001, 0.05, 0.15),
    "haze": Null(0.002, 0.048, 0.17),
    "saturation": Null(0.002, 0.11, 1.5),
    "clipped": Null(0.005, 0.034, 0.18),
    "grain": Null(0.02, 0.22, 1.1),
    "motion": Null(0.01, 0.41, 2.3),
    "temporal_sharpness": Null(0.01, 0.14, 1.0),
    "repeated": Null(0.02, 0.05, 0.2),
    "artefacts": Null(0.01, 0.065, 0.06),
    "finite": Null(1e-6, 1e-6, 1e-6),
}
"""Channel to its deviations; ``blur`` is the composite of :func:`cogflow.sharpness.verdict.blur`."""
