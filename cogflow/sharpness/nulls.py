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
    "edge_sharpness": Null(0.002, 0.025, 0.12),
    "reblur": Null(0.001, 0.011, 0.04),
    "detail": Null(0.02, 0.21, 1.2),
    "blur_effect": Null(0.002, 0.022, 0.25),
    "blur": Null(0.001, 0.012, 0.05),
    "smear": Null(0.01, 0.15, 0.4),
    "veil": Null(0.002, 0.035, 0.1),
    "contrast": Null(0.001, 0.10, 0.5),
    "brightness": Null(0.001, 0.05, 0.15),
    "haze": Null(0.002, 0.04, 0.1),
    "saturation": Null(0.002, 0.10, 0.8),
    "clipped": Null(0.005, 0.02, 0.1),
    "grain": Null(0.02, 0.20, 0.8),
    "motion": Null(0.01, 0.30, 1.5),
    "temporal_sharpness": Null(0.01, 0.10, 0.6),
    "repeated": Null(0.02, 0.05, 0.2),
    "artefacts": Null(0.01, 0.03, 0.05),
    "finite": Null(1e-6, 1e-6, 1e-6),
}
"""Channel to its deviations; ``blur`` is the composite of :func:`cogflow.sharpness.verdict.blur`."""
