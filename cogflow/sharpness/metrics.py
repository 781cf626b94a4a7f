"""The sharpness panel: some numbers per clip, from raw frames, computed on the device they are on. No weights.

Content moves most channels as much as blur does, so that numbers of different clips say little: compare the same prompt and noise
(:mod:`cogflow.sharpness.verdict`). What each channel is, where it comes from and what fools it stands with the function that computes it
(``edges``, ``spatial``, ``tone``, ``temporal``, ``artefacts``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogflow.sharpness import artefacts, edges, spatial, temporal, tone
from cogflow.sharpness.frames import (
    as_clips,
    finite_share,
    pooled,
    repeated_share,
    spatial_places,
    to_float,
    to_luma,
    triple_places,
)

Metrics = dict[str, float]
"""Channel name to value; always finite."""

CHUNK_PIXELS = {"cpu": 400_000}  # frames worked on at once: what stays in a core's cache
CHUNK_PIXELS_ELSEWHERE = 64_000_000  # some 5 GB of a GPU's memory
BAND_FLOOR = 1e-8  # of a wavelet band's energy: that of a flat frame; 8-bit rounding has 1.3e-6


@dataclass(frozen=True)
class Metric:
    """One number of the panel. ``scale`` log: a change is the log of candidate over reference, each raised by ``floor``; difference: it is
    candidate minus reference, for what is a log or a share already. ``group``: blur, tone, grain, motion or artefact."""

    name: str
    title: str
    group: str
    scale: str
    sees: str
    floor: float = 0.0


_CHANNELS = (
    Metric(
        "edge_sharpness",
        "edge sharpness",
        "blur",
        "log",
        "blur: the slope of edges over the range they cross, 1/pixels",
        1e-3,
    ),
    Metric(
        "reblur",
        "re-blur loss",
        "blur",
        "difference",
        "blur: what further smoothing takes from the slope of edges, as a log",
    ),
    Metric("wavelet_ratio", "wavelet ratio", "blur", "difference", "blur: second-finest band over the third, as a log"),
    Metric(
        "blur_effect", "blur effect", "blur", "log", "blur: what a box of 11 pixels would still take away (Crete)", 1e-2
    ),
    Metric(
        "detail", "fine detail", "blur", "difference", "texture: finest band over the picture's own variance, as a log"
    ),
    Metric("contrast", "contrast", "tone", "log", "standard deviation of luma", 2e-3),
    Metric("brightness", "brightness", "tone", "difference", "mean luma"),
    Metric("haze", "dark level", "tone", "difference", "a veil over dark tones: the luma that 5 % lie below"),
    Metric("saturation", "saturation", "tone", "log", "strength of colour", 3e-2),
    Metric("clipped", "clipped", "tone", "difference", "share of pixels at the ends of the range"),
    Metric("grain", "grain", "grain", "log", "deviation of the noise in smooth places", 2e-3),
    Metric("motion", "motion", "motion", "difference", "change from frame to frame over variance, as a log"),
    Metric(
        "temporal_sharpness",
        "temporal sharpness",
        "motion",
        "difference",
        "smear in time: quick change over slow, as a log",
    ),
    Metric("repeated", "repeated frames", "motion", "difference", "share of frames that repeat the one before"),
    Metric("artefacts", "artefacts", "artefact", "difference", "a grid of 8x8 blocks, as a log"),
    Metric("finite", "finite values", "artefact", "difference", "share of values that are numbers"),
)
METRICS: dict[str, Metric] = {channel.name: channel for channel in _CHANNELS}


def measure(frames: Tensor | np.ndarray) -> Metrics:
    """The panel of one clip ``[T, H, W, 3]``, sRGB, uint8 or float in 0..1, at least 24 pixels high and wide. Raises ``ValueError``."""
    return measure_batch(torch.as_tensor(frames)[None])[0]


@torch.no_grad()
def measure_batch(clips: Tensor | np.ndarray) -> list[Metrics]:
    """The panels of ``[N, T, H, W, 3]``; computed where the clips are, handed over in one transfer at the end."""
    clips = as_clips(clips)
    found = {**_in_frames(clips), **_in_time(clips), "repeated": repeated_share(clips), "finite": finite_share(clips)}
    values = torch.stack([found[name] for name in METRICS], dim=1).cpu().tolist()
    return [dict(zip(METRICS, row, strict=True)) for row in values]


def change(name: str, candidate: float, reference: float) -> float:
    """How far ``candidate`` is from ``reference`` on the channel's scale (:class:`Channel`); 0 when they are equal."""
    channel = METRICS[name]
    if channel.scale == "difference":
        return candidate - reference
    return math.log((candidate + channel.floor) / (reference + channel.floor))


def moved(name: str, value: float, by: float) -> float:
    """The value whose :func:`change` from ``value`` is ``by``."""
    channel = METRICS[name]
    if channel.scale == "difference":
        return value + by
    return (value + channel.floor) * math.exp(by) - channel.floor


def of_frame(colour: Tensor) -> dict[str, Tensor]:
    """What the spatial channels are made of, per frame: colour ``[B, H, W, 3]``, float32 in 0..1, to ``[B]`` each."""
    luma = to_luma(colour)
    small, red, blue = (pooled(pooled(one)) for one in (luma, colour[..., 0], colour[..., 2]))
    light, heavy = edges.log_slopes(luma)
    finest, second, third = spatial.bands(luma)
    return {
        "light": light,
        "heavy": heavy,
        "finest": spatial.band_energy(finest),
        "second": spatial.band_energy(second),
        "third": spatial.band_energy(third),
        "blur_effect": spatial.blur_effect(luma),
        "contrast": tone.contrast(small),
        "brightness": tone.brightness(luma),
        "haze": tone.dark_level(small),
        "saturation": tone.saturation(red, blue, small),
        "clipped": tone.clipped(colour),
        "grain": spatial.noise_deviation(finest[2]),
        "artefacts": artefacts.grid(luma),
    }


def _in_frames(clips: Tensor) -> dict[str, Tensor]:
    """The spatial channels, ``[N]`` each, from the means over the frames looked at."""
    # Put together from slices: indexing with a list is slower by far.
    picked = torch.stack([clips[:, place] for place in spatial_places(clips.shape[1])], dim=1)
    means = _means([of_frame(to_float(chunk)) for chunk in chunks(picked.flatten(0, 1))], picked.shape[1])
    light, heavy = means.pop("light"), means.pop("heavy")
    finest, second, third = (means.pop(name) + BAND_FLOOR for name in ("finest", "second", "third"))
    return means | {
        "edge_sharpness": light.exp(),
        "reblur": light - heavy,
        "wavelet_ratio": (second / third).log(),
        "detail": (finest / (means["contrast"].square() + BAND_FLOOR)).log(),
    }


def _in_time(clips: Tensor) -> dict[str, Tensor]:
    starts = triple_places(clips.shape[1])
    if not starts:  # too short to tell
        nothing = torch.zeros(len(clips), device=clips.device)
        return {"motion": nothing, "temporal_sharpness": nothing}
    triples = torch.stack([clips[:, start : start + 3] for start in starts], dim=1).flatten(0, 1)
    parts = [temporal.energies(to_luma(to_float(chunk))) for chunk in chunks(triples)]
    return temporal.channels(_means(parts, len(starts)))


def chunks(frames: Tensor) -> Iterator[Tensor]:
    """``frames`` some at a time, along the first dimension: on a CPU one large frame is as many as its cache takes."""
    most = CHUNK_PIXELS.get(frames.device.type, CHUNK_PIXELS_ELSEWHERE)
    yield from frames.split(max(1, most // max(1, frames[0].numel() // 3)))


def _means(parts: list[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    """Chunks put together, and the mean over each clip's ``count`` members: ``[N]`` by name."""
    return {name: torch.cat([part[name] for part in parts]).unflatten(0, (-1, count)).mean(dim=1) for name in parts[0]}
