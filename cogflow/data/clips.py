"""Read the frames that a model trains on from a video file: check, resample in time, resize and crop them.

The result is deterministic.

Frames are resized by torch's antialiased bicubic interpolation. An exact reimplementation by matrix products, with the
same bytes, read whole clips of 49 frames from 1920x1080 to 480x720 only 1.22 to 1.24 times as fast (medians of 6 pairs,
one CPU core), so torch does the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import torch
from torch.nn import functional

from cogflow.config.data_section import DataConfig
from cogflow.data.media import as_clip_errors, file_size
from cogflow.data.media_bytes import ClipError
from cogflow.data.video import PlaneConverter
from cogflow.data.video_decoding import (
    TOLERANCE,
    IncompleteError,
    PacketScan,
    decode_all,
    decode_needed,
    open_video,
)
from cogflow.files.hashing import hash_file

VERSION = 1
"""Version of the frames: increased when the same file and settings give other frames. Part of each clip's key."""

CLIP_SETTINGS = ("frames", "height", "width", "fps", "resize", "crop", "window", "seed")
"""The fields of :class:`DataConfig` on which the result of :func:`read_clip` depends."""

_MOST_SCALED = 32  # pixels of a scaled frame for each pixel of the crop; a panorama of 8:1 in portrait needs 14
_SOURCE_FRAMES = 4  # frames that are kept at their own size, evenly spread

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Clip:
    """Frames of one clip, uint8 sRGB.

    ``frames``: ``[T, H, W, 3]``, stored plane by plane. ``source``: some of the same frames before resizing, ``[K, h,
    w, 3]``; ``source_at``: their places in ``frames``. ``source_size``: (height, width) as displayed. ``source_fps``:
    mean frame rate.
    """

    frames: torch.Tensor
    source_size: Size
    source_fps: float
    source_frames: int
    upscaled: bool
    source: torch.Tensor
    source_at: tuple[int, ...]


def read_clip(path: Path, data: DataConfig, content: str | None = None) -> Clip:
    """Return ``data.frames`` frames of the video at ``data.fps``, each ``data.height`` x ``data.width``.

    For each wanted time the newest frame at or before it is taken, by the frames' own time stamps, so variable rates
    need no special case. ``content``: the SHA-256 of the file where it is already known; it seeds random windows and
    crops. Raises :class:`ClipError`.
    """
    size = file_size(path)
    if content is None and "random" in (data.crop, data.window):
        content = hash_file(path)
    with as_clip_errors(), ExitStack() as stack:
        file = open_video(path, size, stack)
        scan = file.scan
        wanted = window_start(scan, data, content or "") + np.arange(data.frames) / data.fps
        try:
            picked = _pick_frames(decode_needed(file, wanted), data, content or "")
        except (IncompleteError, av.error.FFmpegError):
            picked = _pick_frames(decode_all(file, wanted), data, content or "")
    source_size = (picked.source[0].shape[0], picked.source[0].shape[1])
    scaled = scaled_size(source_size, data)
    return Clip(
        frames=picked.frames.permute(1, 2, 3, 0),
        source_size=source_size,
        source_fps=scan.fps,
        source_frames=len(scan.times),
        upscaled=any(after > before for after, before in zip(scaled, source_size, strict=True)),
        source=torch.from_numpy(np.stack(picked.source)),
        source_at=tuple(picked.places),
    )


def window_start(scan: PacketScan, data: DataConfig, content: str) -> float:
    """Return the time in seconds of the first wanted frame; it is the time stamp of a real frame.

    Raises :class:`ClipError`.
    """
    span = (data.frames - 1) / data.fps
    first, last = float(scan.times[0]), float(scan.times[-1])
    if not scan.holds(data.frames, data.fps):
        needs = data.frames / data.fps
        wanted = f"{data.frames} frames at {data.fps:g} a second"
        raise ClipError(f"too short: has {scan.end - first:.2f} s, needs {needs:.2f} s ({wanted})")
    slack = max(0.0, last - first - span)
    share = {"start": 0.0, "center": 0.5}.get(data.window)
    if share is None:
        share = _rng(data, content, "window").random()
    at = first + share * slack
    return float(scan.times[np.searchsorted(scan.times, at + TOLERANCE, side="right") - 1])


def _rng(data: DataConfig, content: str, purpose: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{purpose}/{data.seed}/{content}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


@dataclass
class _PickedFrames:
    """``frames``: uint8 ``[3, T, H, W]``.

    ``source``: some frames at their own size, ``[h, w, 3]``, from ``places`` of the clip.
    """

    frames: torch.Tensor
    source: list[np.ndarray] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


def _pick_frames(frames: Iterator[tuple[av.VideoFrame, int]], data: DataConfig, content: str) -> _PickedFrames:
    """Convert and resize ``frames`` one by one, so that a long 4K clip is never in memory as a whole.

    Raises :class:`ClipError`.
    """
    total = data.frames
    keep = set(np.linspace(0, total - 1, min(total, _SOURCE_FRAMES)).round().astype(int).tolist())
    picked = _PickedFrames(torch.empty(3, total, data.height, data.width, dtype=torch.uint8))
    to_planes = PlaneConverter()
    size: tuple[int, ...] | None = None
    done = 0
    for frame, count in frames:
        if frame.is_corrupt:
            raise ClipError("damaged: a frame does not decode")
        planes = to_planes(frame)
        shape = planes[0].shape
        if size is not None and size != shape:
            raise ClipError(f"frames change their size from {size[1]}x{size[0]} to {shape[1]}x{shape[0]}")
        size = shape
        if here := keep.intersection(range(done, done + count)):
            picked.source.append(np.stack(planes, axis=-1))
            picked.places.append(min(here))
        fit_frame(planes, data, content, picked.frames[:, done])
        picked.frames[:, done + 1 : done + count] = picked.frames[:, done : done + 1]
        done += count
    if done < total:
        raise ClipError(f"damaged or lying header: {done} of {total} frames decode")
    return picked


def fit_frame(planes: Sequence[np.ndarray], data: DataConfig, content: str, out: torch.Tensor) -> None:
    """Resize and crop the three ``planes`` of a frame, uint8 ``[h, w]``, into ``out``, uint8 ``[3, data.height,
    data.width]``."""
    size = (planes[0].shape[0], planes[0].shape[1])
    scaled = scaled_size(size, data)
    down, right = crop_corner(scaled, data, content)
    rows, columns = slice(down, down + data.height), slice(right, right + data.width)
    if scaled == size:
        for plane, target in zip(planes, out, strict=True):
            target.copy_(torch.from_numpy(plane[rows, columns]))
        return
    frame = torch.stack([torch.from_numpy(plane) for plane in planes]).float()
    resized = functional.interpolate(frame[None], size=scaled, mode="bicubic", antialias=True, align_corners=False)[0]
    out.copy_(resized[:, rows, columns].round_().clamp_(0, 255))


def scaled_size(size: Size, data: DataConfig) -> Size:
    """Return height and width after resizing and before cropping.

    Raises :class:`ClipError` for a frame that is smaller with ``data.resize=none``, or far too narrow.
    """
    height, width = size
    if data.resize == "stretch":
        return data.height, data.width
    if data.resize == "none":
        if height < data.height or width < data.width:
            raise ClipError(f"too small: {width}x{height}, and data.resize=none needs {data.width}x{data.height}")
        return size
    scale = max(data.height / height, data.width / width)
    if height * width * scale**2 > max(height * width, _MOST_SCALED * data.height * data.width):
        raise ClipError(f"too narrow: {width}x{height} for {data.width}x{data.height}")
    return max(data.height, round(height * scale)), max(data.width, round(width * scale))


def crop_corner(scaled: Size, data: DataConfig, content: str) -> tuple[int, int]:
    """Return row and column of the upper left corner of the crop in a frame of the size ``scaled``."""
    height, width = scaled
    if data.crop == "random":
        rng = _rng(data, content, "crop")
        return int(rng.integers(0, height - data.height + 1)), int(rng.integers(0, width - data.width + 1))
    return (height - data.height) // 2, (width - data.width) // 2
