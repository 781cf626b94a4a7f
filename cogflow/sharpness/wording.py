"""Findings in words."""

from __future__ import annotations

import math

from cogflow.sharpness.causes import RUNGS, likely

_WHAT = {
    "soft": "fine detail is lost",
    "over_sharpened": "the picture is sharper than it should be",
    "washed_out": "contrast is lost",
    "hazy": "a veil lies over dark tones",
    "smeared": "frames are smeared in time",
    "grainy": "there is more noise",
    "saturated": "colours are stronger",
    "frozen": "there is less motion",
    "identical": "frames repeat each other",
    "black": "the picture is black",
    "artefacts": "there are patterns no camera makes",
    "non_finite": "some values are no numbers",
    "unchanged": "the samples are the same to the bit as before the first step",
    "ema_behind": "the averaged weights lag behind",
}
_LOGS = (
    "wavelet_ratio",
    "edge_sharpness",
    "blur_effect",
    "contrast",
    "saturation",
    "grain",
    "motion",
    "temporal_sharpness",
    "detail",
)
_NO_SIZE = ("identical", "black", "non_finite", "unchanged", "ema_behind")

GAUSSIAN = ((0.0, 0.0), (0.8, -0.35), (1.0, -0.55), (1.5, -1.1))
"""Sigma in pixels, and the median change of wavelet_ratio it makes on real clips of 480x720."""


def sentence(kind: str, level: str, channel: str, size: float, z: float, rung: int | None, since: int | None) -> str:
    """One sentence: level, kind, how much, where, since when, and likely causes, the likeliest first."""
    words = [f"{level}: {kind.replace('_', ' ')}"]
    if rung is not None:
        words.append(f" at rung {rung} ({RUNGS.get(rung, '?')})")
    words.append(f": {_WHAT.get(kind, kind)}")
    if kind not in _NO_SIZE:
        words.append(f" ({amount(channel, size)}, z {z:+.1f})")
    if since is not None:
        words.append(f", since step {since}")
    if causes := likely(kind, rung):
        words.append("; likely: " + ", ".join(causes))
    return "".join(words)


def amount(channel: str, size: float) -> str:
    """A change in words: per cent for a log ratio, and what Gaussian blur it is like for ``wavelet_ratio``."""
    title = channel.replace("_", " ")
    if channel not in _LOGS:
        return f"{title} {size:+.3g}"
    told = f"{title} {math.expm1(min(size, 20.0)):+.0%}"
    if channel == "wavelet_ratio" and size < 0:
        told += f", like a Gaussian blur of {pixels(size)}"
    return told


def pixels(size: float) -> str:
    """The Gaussian sigma that changes ``wavelet_ratio`` by ``size``, in words."""
    if size <= GAUSSIAN[-1][1]:
        return f"{GAUSSIAN[-1][0]:g} pixels or more"
    for (less, above), (more, below) in zip(GAUSSIAN, GAUSSIAN[1:], strict=False):
        if size >= below:
            return f"about {less + (more - less) * (above - size) / (above - below):.1f} pixels"
    return "no size"
