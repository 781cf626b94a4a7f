"""The sharpness panel: some numbers per clip, from raw frames, computed on the device they are on. No weights.

Content moves most channels as much as blur does, so that numbers of different clips say little: compare the same prompt and noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogflow.sharpness import artefacts, spatial, temporal, tone
from cogflow.sharpness.frames import Views, as_clips, views

Panel = dict[str, float]
"""Channel name to value; always finite."""


@dataclass(frozen=True)
class Channel:
    """One number of the panel. ``scale`` log: a change is the log of candidate over reference, each raised by ``floor``; difference: it is
    candidate minus reference, for what is a log or a share already. ``group``: blur, tone, grain, motion or artefact."""

    name: str
    title: str
    group: str
    scale: str
    sees: str
    floor: float = 1e-6


_CHANNELS = (
    Channel("wavelet_ratio", "wavelet ratio", "blur", "difference", "blur: fine detail over coarser detail"),
    Channel("edge_sharpness", "edge sharpness", "blur", "log", "blur: the slope of strong edges"),
    Channel("blur_effect", "blur effect", "blur", "log", "blur: what a box filter would still take away"),
    Channel("contrast", "contrast", "tone", "log", "contrast of luma", 1e-3),
    Channel("brightness", "brightness", "tone", "difference", "mean luma"),
    Channel("haze", "dark level", "tone", "difference", "a veil over dark tones"),
    Channel("saturation", "saturation", "tone", "log", "strength of colour", 1e-2),
    Channel("clipped", "clipped", "tone", "difference", "share of pixels at the ends of the range"),
    Channel("grain", "grain", "grain", "log", "noise in smooth places", 1e-3),
    Channel("motion", "motion", "motion", "difference", "change from frame to frame, as a log"),
    Channel("temporal_sharpness", "temporal sharpness", "motion", "difference", "smear in time: quick change over slow change, as a log"),
    Channel("repeated", "repeated frames", "motion", "difference", "share of frames that repeat the one before"),
    Channel("artefacts", "artefacts", "artefact", "difference", "a grid of blocks, as a log"),
    Channel("finite", "finite values", "artefact", "difference", "share of values that are numbers"),
)
CHANNELS: dict[str, Channel] = {channel.name: channel for channel in _CHANNELS}


def measure(frames: Tensor | np.ndarray) -> Panel:
    """The panel of one clip ``[T, H, W, 3]``, sRGB, uint8 or float in 0..1, at least 24 pixels high and wide. Raises ``ValueError``."""
    return measure_batch(torch.as_tensor(frames)[None])[0]


@torch.no_grad()
def measure_batch(clips: Tensor | np.ndarray) -> list[Panel]:
    """The panels of ``[N, T, H, W, 3]``; computed where the clips are, handed over in one transfer at the end."""
    seen = views(as_clips(clips))
    values = torch.stack(list(_values(seen).values()), dim=1).double().cpu().tolist()
    return [dict(zip(CHANNELS, row, strict=True)) for row in values]


def change(name: str, candidate: float, reference: float) -> float:
    """How far ``candidate`` is from ``reference`` on the channel's scale (:class:`Channel`); 0 when they are equal."""
    channel = CHANNELS[name]
    if channel.scale == "difference":
        return candidate - reference
    return math.log((candidate + channel.floor) / (reference + channel.floor))


def _values(seen: Views) -> dict[str, Tensor]:
    """Channel name to ``[N]``."""
    clips, count = seen.luma.shape[:2]
    luma = seen.luma.flatten(0, 1)
    colour = seen.colour.flatten(0, 1)

    def mean(values: Tensor) -> Tensor:
        return values.unflatten(0, (clips, count)).mean(dim=1)

    def of_luma(metric: Callable[[Tensor], Tensor]) -> Tensor:
        return mean(metric(luma))

    finest, second, third = spatial.bands(luma)
    fine, coarse = mean(spatial.band_energy(second)), mean(spatial.band_energy(third))
    found = {
        "wavelet_ratio": ((fine + 1e-8) / (coarse + 1e-8)).log(),
        "edge_sharpness": of_luma(spatial.edge_sharpness),
        "blur_effect": of_luma(spatial.blur_effect),
        "contrast": of_luma(tone.contrast),
        "brightness": of_luma(tone.brightness),
        "haze": of_luma(tone.dark_level),
        "saturation": mean(tone.saturation(colour, luma)),
        "clipped": mean(tone.clipped(colour)),
        "grain": mean(spatial.noise_deviation(finest[2])),
        **_in_time(seen),
        "repeated": seen.repeated,
        "artefacts": of_luma(artefacts.grid),
        "finite": seen.finite,
    }
    return {name: found[name] for name in CHANNELS}


def _in_time(seen: Views) -> dict[str, Tensor]:
    clips, count = seen.triples.shape[:2]
    if count == 0:  # too short to tell
        return {"motion": seen.luma.new_zeros(clips), "temporal_sharpness": seen.luma.new_zeros(clips)}
    change_, bend, variance = (part.unflatten(0, (clips, count)).mean(dim=1) for part in temporal.energies(seen.triples.flatten(0, 1)))
    floor = temporal.FLOOR
    return {
        "motion": ((change_ + floor) / (variance + floor)).log(),
        "temporal_sharpness": ((bend + floor) / (change_ + floor)).log(),
    }
