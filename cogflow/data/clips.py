"""From a video file to the frames a model trains on: checked, resampled in time, resized, cropped. Deterministic."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch

from cogflow.config.data_section import DataConfig
from cogflow.data import decode
from cogflow.data.packet_scan import TOLERANCE, ClipError, Scan, as_clip_errors, file_size
from cogflow.data.resize import Geometry, resize
from cogflow.data.video import ToPlanes
from cogflow.files.hashing import hash_file

VERSION = 1
"""Raised when the same file and settings would give other frames; part of each cached clip's key."""

SETTINGS = ("frames", "height", "width", "fps", "resize", "crop", "window", "seed")
"""The fields of :class:`DataConfig` that decide what :func:`read_clip` returns."""

_KEPT = 4  # frames kept at their own size, evenly spread


@dataclass(frozen=True)
class Clip:
    """``frames`` is uint8 ``[T, H, W, 3]`` sRGB, by planes in memory. ``source_size`` is (height, width) as displayed, ``source_fps`` the
    mean rate.

    ``source``: a few of the same frames before they were resized, uint8 ``[K, h, w, 3]``; ``source_at``: their places in ``frames``.
    """

    frames: torch.Tensor
    source_size: tuple[int, int]
    source_fps: float
    source_frames: int
    upscaled: bool
    source: torch.Tensor
    source_at: tuple[int, ...]


def read_clip(path: Path, data: DataConfig, content: str | None = None) -> Clip:
    """``data.frames`` frames of the video at ``data.fps``, each ``data.height`` x ``data.width``.

    For each wanted time the newest frame at or before it is taken, by the frames' own time stamps (so a variable rate
    is no special case). Sizes change by antialiased bicubic interpolation. ``content`` is the SHA-256 of the file
    where it is already known; random windows and crops follow from it. Raises :class:`ClipError`.
    """
    size = file_size(path)
    if content is None and "random" in (data.crop, data.window):
        content = hash_file(path)
    with as_clip_errors(), ExitStack() as stack:
        file = decode.opened(path, size, stack)
        scan = file.scan
        start = window_start(scan, data, content or "")
        wanted = start + np.arange(data.frames) / data.fps
        try:
            picked = _pick(decode.few(file, wanted), len(wanted), data, content or "")
        except (decode.Incomplete, av.error.FFmpegError):
            picked = _pick(decode.all_(file, wanted), len(wanted), data, content or "")
    own = (picked.source[0].shape[0], picked.source[0].shape[1])
    upscaled = any(after > before for after, before in zip(scaled_size(own, data), own, strict=True))
    source = torch.from_numpy(np.stack(picked.source))
    return Clip(
        picked.frames.permute(1, 2, 3, 0), own, scan.fps, len(scan.times), upscaled, source, tuple(picked.places)
    )


def _rng(data: DataConfig, content: str, purpose: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{purpose}/{data.seed}/{content}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def window_start(scan: Scan, data: DataConfig, content: str) -> float:
    """When the first wanted frame is shown; always the time of a real frame."""
    span = (data.frames - 1) / data.fps
    first, last = float(scan.times[0]), float(scan.times[-1])
    if not scan.holds(data.frames, data.fps):
        needs = data.frames / data.fps
        raise ClipError(
            f"too short: has {scan.end - first:.2f} s, needs {needs:.2f} s ({data.frames} frames at {data.fps:g} a second)"
        )
    slack = max(0.0, last - first - span)
    share = {"start": 0.0, "center": 0.5}.get(data.window)
    if share is None:
        share = _rng(data, content, "window").random()
    at = first + share * slack
    return float(scan.times[np.searchsorted(scan.times, at + TOLERANCE, side="right") - 1])


@dataclass
class _Picked:
    """The clip's frames, uint8 ``[3, T, H, W]`` as the VAE takes them, and a few of them as they were, ``[h, w, 3]``, with their places."""

    frames: torch.Tensor
    source: list[np.ndarray]
    places: list[int]


def _pick(frames: Iterator[tuple[av.VideoFrame, int]], total: int, data: DataConfig, content: str) -> _Picked:
    """Each frame is shrunk at once: a long 4K clip never lies in memory."""
    keep = set(np.linspace(0, total - 1, min(total, _KEPT)).round().astype(int).tolist())
    picked = _Picked(torch.empty(3, total, data.height, data.width, dtype=torch.uint8), [], [])
    to_planes, size, done = ToPlanes(), None, 0
    for frame, count in frames:
        if frame.is_corrupt:
            raise ClipError("damaged: a frame does not decode")
        planes = to_planes(frame)
        if size is None:
            size = planes[0].shape
        elif size != planes[0].shape:
            raise ClipError(
                f"frames change their size from {size[1]}x{size[0]} to {planes[0].shape[1]}x{planes[0].shape[0]}"
            )
        if here := keep.intersection(range(done, done + count)):
            picked.source.append(np.stack(planes, axis=-1))
            picked.places.append(min(here))
        fit(planes, data, content, picked.frames[:, done])
        picked.frames[:, done + 1 : done + count] = picked.frames[:, done : done + 1]
        done += count
    if done < total:
        raise ClipError(f"damaged or lying header: {done} of {total} frames decode")
    return picked


def scaled_size(size: tuple[int, int], data: DataConfig) -> tuple[int, int]:
    """Height and width after resizing and before cropping."""
    height, width = size
    if data.resize == "stretch":
        return data.height, data.width
    if data.resize == "none":
        if height < data.height or width < data.width:
            raise ClipError(f"too small: {width}x{height}, and data.resize=none needs {data.width}x{data.height}")
        return size
    scale = max(data.height / height, data.width / width)
    return max(data.height, round(height * scale)), max(data.width, round(width * scale))


def fit(planes: Sequence[np.ndarray], data: DataConfig, content: str, out: torch.Tensor) -> None:
    """Resize and crop the three ``planes`` of a picture, uint8 ``[h, w]``, into ``out``, uint8 ``[3, data.height, data.width]``."""
    size = (planes[0].shape[0], planes[0].shape[1])
    scaled = scaled_size(size, data)
    resize(planes, Geometry(size, scaled, corner(scaled, data, content), (data.height, data.width)), out)


def corner(scaled: tuple[int, int], data: DataConfig, content: str) -> tuple[int, int]:
    """Where the crop begins (rows from the top, columns from the left) in a frame that was resized to ``scaled``."""
    height, width = scaled
    if data.crop == "random":
        rng = _rng(data, content, "crop")
        return int(rng.integers(0, height - data.height + 1)), int(rng.integers(0, width - data.width + 1))
    return (height - data.height) // 2, (width - data.width) // 2
