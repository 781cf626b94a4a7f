"""From a video file to the frames a model trains on: checked, resampled in time, resized, cropped. Deterministic."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from torch.nn import functional

from cogflow.config.schema import DataConfig
from cogflow.data.scan import TOLERANCE, Scan, as_clip_errors, file_size, scan_packets
from cogflow.data.scan import ClipError as ClipError
from cogflow.data.video import to_rgb
from cogflow.files.manifest import hash_file

VERSION = 1
"""Raised when the same file and settings would give other frames; part of each cached clip's key."""

SETTINGS = ("frames", "height", "width", "fps", "resize", "crop", "window", "seed")
"""The fields of :class:`DataConfig` that decide what :func:`read_clip` returns."""

_SEEK_FROM = 4.0  # seconds; below, decoding from the start is as quick
_KEPT = 4  # frames kept at their own size, evenly spread


@dataclass(frozen=True)
class Clip:
    """``frames`` is uint8 ``[T, H, W, 3]`` sRGB. ``source_size`` is (height, width) as displayed, ``source_fps`` the mean rate.

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
    with as_clip_errors():
        scan = scan_packets(path, size)
        start = _window_start(scan, data, content or "")
        wanted = start + np.arange(data.frames) / data.fps
        picked = _pick(path, scan, wanted, data, content or "")
    own = (picked.source[0].shape[0], picked.source[0].shape[1])
    upscaled = any(after > before for after, before in zip(scaled_size(own, data), own, strict=True))
    source = torch.from_numpy(np.stack(picked.source))
    return Clip(torch.stack(picked.frames), own, scan.fps, len(scan.times), upscaled, source, tuple(picked.places))


def _rng(data: DataConfig, content: str, purpose: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{purpose}/{data.seed}/{content}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _window_start(scan: Scan, data: DataConfig, content: str) -> float:
    """When the first wanted frame is shown; always the time of a real frame."""
    span = (data.frames - 1) / data.fps
    first, last = float(scan.times[0]), float(scan.times[-1])
    if not scan.holds(data.frames, data.fps):
        needs = data.frames / data.fps
        raise ClipError(f"too short: has {scan.end - first:.2f} s, needs {needs:.2f} s ({data.frames} frames at {data.fps:g} a second)")
    slack = max(0.0, last - first - span)
    share = {"start": 0.0, "center": 0.5}.get(data.window)
    if share is None:
        share = _rng(data, content, "window").random()
    at = first + share * slack
    return float(scan.times[np.searchsorted(scan.times, at + TOLERANCE, side="right") - 1])


@dataclass
class _Picked:
    """The clip's frames, and a few of them as they were with their places."""

    frames: list[torch.Tensor]
    source: list[np.ndarray]
    places: list[int]


def _pick(path: Path, scan: Scan, wanted: np.ndarray, data: DataConfig, content: str) -> _Picked:
    """Decode once and keep only what is wanted, each frame shrunk at once: a long 4K clip never lies in memory."""
    keep = set(np.linspace(0, len(wanted) - 1, min(len(wanted), _KEPT)).round().astype(int).tolist())
    picked = _Picked([], [], [])
    size: tuple[int, int] | None = None
    for frame, count in _select(path, scan, wanted):
        if frame.is_corrupt:
            raise ClipError("damaged: a frame does not decode")
        image = to_rgb(frame)
        if size is None:
            size = (image.shape[0], image.shape[1])
        elif size != image.shape[:2]:
            raise ClipError(f"frames change their size from {size[1]}x{size[0]} to {image.shape[1]}x{image.shape[0]}")
        shown = range(len(picked.frames), len(picked.frames) + count)
        if here := keep.intersection(shown):
            picked.source.append(image)
            picked.places.append(min(here))
        picked.frames.extend([_fit(image, data, content)] * count)
    if size is None or len(picked.frames) < len(wanted):
        raise ClipError(f"damaged or lying header: {len(picked.frames)} of {len(wanted)} frames decode")
    return picked


def _select(path: Path, scan: Scan, wanted: np.ndarray) -> Iterator[tuple[av.VideoFrame, int]]:
    """The frames shown at the ``wanted`` times, each with the number of times it is wanted."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        base = float(stream.time_base or 0)
        frames = container.decode(stream)
        if wanted[0] - scan.times[0] > _SEEK_FROM:
            container.seek(int(wanted[0] / base), stream=stream)
            frames = container.decode(stream)
        shown: av.VideoFrame | None = None
        done = 0
        for frame in frames:
            if frame.pts is None:
                raise ClipError("frames carry no time stamps")
            upcoming = frame.pts * base
            if shown is None and upcoming > wanted[0] + TOLERANCE:
                raise ClipError("damaged: the first wanted frame does not decode")
            # `shown` stays on screen until `upcoming`: it serves all wanted times before that.
            until = int(np.searchsorted(wanted, upcoming - TOLERANCE, side="left"))
            if shown is not None and until > done:
                yield shown, until - done
                done = until
            if done == len(wanted):
                return
            shown = frame
        if shown is not None:
            # Short of the packets' last frame the decoder gave up early, and the rest must not be filled with a still.
            if float(shown.pts or 0) * base < min(float(wanted[-1]), float(scan.times[-1])) - 1.5 / scan.fps:
                return
            yield shown, len(wanted) - done


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


def _fit(image: np.ndarray, data: DataConfig, content: str) -> torch.Tensor:
    """Resize and crop one uint8 ``[h, w, 3]`` image to uint8 ``[data.height, data.width, 3]``."""
    picture = torch.from_numpy(image)
    height, width = scaled_size((image.shape[0], image.shape[1]), data)
    if (height, width) != image.shape[:2]:
        planes = picture.permute(2, 0, 1)[None].float()
        planes = functional.interpolate(planes, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
        picture = planes[0].permute(1, 2, 0).round_().clamp_(0, 255).to(torch.uint8)
    down, right = corner((height, width), data, content)
    return picture[down : down + data.height, right : right + data.width].contiguous()


def corner(scaled: tuple[int, int], data: DataConfig, content: str) -> tuple[int, int]:
    """Where the crop begins (rows from the top, columns from the left) in a frame that was resized to ``scaled``."""
    height, width = scaled
    if data.crop == "random":
        rng = _rng(data, content, "crop")
        return int(rng.integers(0, height - data.height + 1)), int(rng.integers(0, width - data.width + 1))
    return (height - data.height) // 2, (width - data.width) // 2
