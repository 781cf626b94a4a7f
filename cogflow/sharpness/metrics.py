"""The sharpness metrics of a clip: sixteen numbers from raw frames, computed on the device they are on, without a
learned model.

Content moves most metrics as much as blur does, so numbers of different clips say little: compare the same prompt and
noise (:func:`cogflow.sharpness.compare`). The formula, source, range and weaknesses of each metric are documented with
its function in :mod:`cogflow.sharpness.frame_metrics` and :mod:`cogflow.sharpness.frames`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogflow.sharpness import frame_metrics
from cogflow.sharpness.filters import wavelet_bands
from cogflow.sharpness.frames import (
    as_clips,
    finite_share,
    pool_2x2,
    repeated_share,
    spatial_indices,
    to_float,
    to_luma,
    triple_indices,
)

Metrics = dict[str, float]
"""Metric name to value; always finite."""

CPU_CHUNK_PIXELS = 400_000  # frames computed at once on a CPU: what stays in a core's cache
GPU_CHUNK_PIXELS = 64_000_000  # some 5 GB of a GPU's memory
BAND_FLOOR = 1e-8  # of a wavelet band's energy: that of a flat frame; 8-bit rounding has 1.3e-6


@dataclass(frozen=True)
class Metric:
    """A metric and its scale.

    ``scale`` "log": a change is the log of candidate over reference, each raised by ``floor``; "difference": a change
    is candidate minus reference, for values that are logs or shares already. ``group``: blur, tone, grain, motion or
    artefact.
    """

    name: str
    title: str
    group: str
    scale: str
    description: str
    floor: float = 0.0


_TABLE = (
    # name, title, group, scale, description, floor
    ("edge_sharpness", "edge sharpness", "blur", "log", "slope of edges over the range they cross, 1/pixels", 1e-3),
    (
        "reblur",
        "re-blur loss",
        "blur",
        "difference",
        "what further smoothing takes from the slope of edges, as a log",
        0,
    ),
    ("wavelet_ratio", "wavelet ratio", "blur", "difference", "second-finest wavelet band over the third, as a log", 0),
    ("blur_effect", "blur effect", "blur", "log", "what a box of 11 pixels would still take away (Crete)", 1e-2),
    ("detail", "fine detail", "blur", "difference", "finest band over the picture's own variance, as a log", 0),
    ("contrast", "contrast", "tone", "log", "standard deviation of luma", 2e-3),
    ("brightness", "brightness", "tone", "difference", "mean luma", 0),
    ("haze", "dark level", "tone", "difference", "5 % quantile of luma: a veil over dark tones raises it", 0),
    ("saturation", "saturation", "tone", "log", "strength of colour", 3e-2),
    ("clipped", "clipped", "tone", "difference", "share of pixels at the ends of the range", 0),
    ("grain", "grain", "grain", "log", "deviation of the noise in smooth areas", 2e-3),
    ("motion", "motion", "motion", "difference", "change between frames over variance, as a log", 0),
    ("temporal_sharpness", "temporal sharpness", "motion", "difference", "quick change over slow change, as a log", 0),
    ("repeated", "repeated frames", "motion", "difference", "share of frames that repeat the previous frame", 0),
    ("artefacts", "artefacts", "artefact", "difference", "a grid of 8x8 blocks, as a log", 0),
    ("finite", "finite values", "artefact", "difference", "share of finite values", 0),
)
METRICS: dict[str, Metric] = {row[0]: Metric(*row) for row in _TABLE}


def measure(frames: Tensor | np.ndarray) -> Metrics:
    """Return the metrics of one clip ``[T, H, W, 3]``, sRGB, uint8 or float in 0..1, at least 24 pixels high and wide.

    Raise ``ValueError`` for other shapes and dtypes.
    """
    return measure_batch(torch.as_tensor(frames)[None])[0]


@torch.no_grad()
def measure_batch(clips: Tensor | np.ndarray) -> list[Metrics]:
    """Return the metrics of each clip of ``[N, T, H, W, 3]``, computed where the clips are, in one transfer to the
    CPU.
    """
    clips = as_clips(clips)
    values = {
        **_spatial_metrics(clips),
        **_temporal_metrics(clips),
        "repeated": repeated_share(clips),
        "finite": finite_share(clips),
    }
    table = torch.stack([values[name] for name in METRICS], dim=1).cpu().tolist()
    return [dict(zip(METRICS, row, strict=True)) for row in table]


def change(name: str, candidate: float, reference: float) -> float:
    """Return how far ``candidate`` is from ``reference`` on the metric's scale (:class:`Metric`); 0 when they are
    equal.
    """
    metric = METRICS[name]
    if metric.scale == "difference":
        return candidate - reference
    return math.log((candidate + metric.floor) / (reference + metric.floor))


def shift_value(name: str, value: float, by: float) -> float:
    """Return the value whose :func:`change` from ``value`` is ``by``."""
    metric = METRICS[name]
    if metric.scale == "difference":
        return value + by
    return (value + metric.floor) * math.exp(by) - metric.floor


def frame_values(colour: Tensor) -> dict[str, Tensor]:
    """Return the numbers that the spatial metrics are made of: colour ``[B, H, W, 3]``, float32 in 0..1, to ``[B]``
    each.
    """
    luma = to_luma(colour)
    small, red, blue = (pool_2x2(pool_2x2(plane)) for plane in (luma, colour[..., 0], colour[..., 2]))
    light, heavy = frame_metrics.edge_log_slopes(luma)
    finest, second, third = wavelet_bands(luma)
    return {
        "light": light,
        "heavy": heavy,
        "finest": frame_metrics.band_energy(finest),
        "second": frame_metrics.band_energy(second),
        "third": frame_metrics.band_energy(third),
        "blur_effect": frame_metrics.blur_effect(luma),
        "contrast": frame_metrics.contrast(small),
        "brightness": frame_metrics.brightness(luma),
        "haze": frame_metrics.dark_level(small),
        "saturation": frame_metrics.saturation(red, blue, small),
        "clipped": frame_metrics.clipped(colour),
        "grain": frame_metrics.noise_deviation(finest[2]),
        "artefacts": frame_metrics.block_grid(luma),
    }


def split_chunks(frames: Tensor) -> Iterator[Tensor]:
    """Split ``frames`` along the first dimension into chunks that fit a core's cache or a part of a GPU's memory."""
    most = CPU_CHUNK_PIXELS if frames.device.type == "cpu" else GPU_CHUNK_PIXELS
    yield from frames.split(max(1, most // max(1, frames[0].numel() // 3)))


def _spatial_metrics(clips: Tensor) -> dict[str, Tensor]:
    """Return the spatial metrics, ``[N]`` each, from the means over the selected frames."""
    # Slices are stacked because indexing with a list is slower by far.
    selected = torch.stack([clips[:, index] for index in spatial_indices(clips.shape[1])], dim=1)
    chunks = [frame_values(to_float(chunk)) for chunk in split_chunks(selected.flatten(0, 1))]
    means = _clip_means(chunks, selected.shape[1])
    light, heavy = means.pop("light"), means.pop("heavy")
    finest, second, third = (means.pop(name) + BAND_FLOOR for name in ("finest", "second", "third"))
    return means | {
        "edge_sharpness": light.exp(),
        "reblur": light - heavy,
        "wavelet_ratio": (second / third).log(),
        "detail": (finest / (means["contrast"].square() + BAND_FLOOR)).log(),
    }


def _temporal_metrics(clips: Tensor) -> dict[str, Tensor]:
    """Return ``motion`` and ``temporal_sharpness``, ``[N]`` each; 0 for clips below three frames."""
    starts = triple_indices(clips.shape[1])
    if not starts:
        nothing = torch.zeros(len(clips), device=clips.device)
        return {"motion": nothing, "temporal_sharpness": nothing}
    triples = torch.stack([clips[:, start : start + 3] for start in starts], dim=1).flatten(0, 1)
    chunks = [frame_metrics.temporal_energies(to_luma(to_float(chunk))) for chunk in split_chunks(triples)]
    return frame_metrics.temporal_metrics(_clip_means(chunks, len(starts)))


def _clip_means(chunks: list[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    """Join chunks and return the mean over each clip's ``count`` members: ``[N]`` by name."""
    joined = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return {name: values.unflatten(0, (-1, count)).mean(dim=1) for name, values in joined.items()}
