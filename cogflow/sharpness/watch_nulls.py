"""What the watch takes as no damage: measured deviations of a prompt's change, weights of the blur composite, and limits.

First figures; ``stage=benchmark stage.what=watch`` shows what they lead to.
"""

from __future__ import annotations

from dataclasses import dataclass

BLUR_WEIGHTS: dict[str, float] = {"wavelet_ratio": 1.4, "edge_sharpness": 0.8, "blur_effect": 0.5}
"""Weights of the blur channels' changes. The composite is about -1 for a Gaussian of sigma 1 pixel."""


@dataclass(frozen=True)
class Drift:
    """One prompt's change between two samples that are equally good. ``deviation``: of the change; ``matters``: the smallest shift of
    all prompts together that is worth an alarm, however sure it is; ``contents``: deviation of the value over contents."""

    deviation: float
    matters: float
    contents: float


DRIFTS: dict[str, Drift] = {
    "blur": Drift(0.25, 0.15, 1.0),
    "contrast": Drift(0.15, 0.10, 0.5),
    "haze": Drift(0.04, 0.04, 0.1),
    "temporal_sharpness": Drift(0.2, 0.15, 0.6),
    "grain": Drift(0.3, 0.3, 0.8),
    "saturation": Drift(0.25, 0.2, 0.8),
    "motion": Drift(0.6, 0.7, 1.5),
    "artefacts": Drift(0.03, 0.05, 0.05),
}
"""Tested channels, by name; ``blur`` is the composite of BLUR_WEIGHTS."""

PRIOR_DF = 6.0  # prompts that a measured deviation counts for
WEIGHT = 0.4  # of the newest validation in the smoothed change
WARNING, ALARM = 3.5, 4.5  # normal scores
