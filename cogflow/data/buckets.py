"""Clips of several sizes in one training: each is prepared at the size, one of ``data.buckets``, that wastes least of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cogflow.config.data_section import DataConfig
from cogflow.data.packet_scan import ClipError, Look, look

Size = tuple[int, int, int]
"""Frames, height, width."""


def size_of(bucket: str) -> Size:
    """``"49x480x720"`` as numbers. Raises ``ValueError`` for anything else."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", bucket, re.ASCII):
        raise ValueError(bucket)
    frames, height, width = map(int, bucket.split("x"))
    return frames, height, width


def sizes(data: DataConfig) -> list[Size]:
    """The sizes that clips are prepared at: those of the buckets, or the one there is."""
    return [size_of(bucket) for bucket in data.buckets] or [(data.frames, data.height, data.width)]


def sized(data: DataConfig, bucket: str | None) -> DataConfig:
    """``data`` at the size of ``bucket``; as it is without one."""
    if bucket is None:
        return data
    frames, height, width = size_of(bucket)
    return replace(data, frames=frames, height=height, width=width)


def assign(path: Path, data: DataConfig) -> str:
    """The bucket of the clip at ``path``. Raises :class:`ClipError` for a clip that cannot be read or fits none."""
    return choose(look(path), data)


def choose(seen: Look, data: DataConfig) -> str:
    """The bucket for a clip: of those whose frames it has, the one that least of the picture is cut off for; where that differs by less
    than a percent, the one with the most frames; then the largest that it is not scaled up for. Raises :class:`ClipError`."""
    candidates = [bucket for bucket in data.buckets if seen.holds(size_of(bucket)[0], data.fps)]
    if not candidates:
        shortest = min(size_of(bucket)[0] for bucket in data.buckets)
        raise ClipError(
            f"too short for every bucket: has {seen.seconds:.2f} s, the shortest takes {shortest / data.fps:.2f} s "
            f"({shortest} frames at {data.fps:g} a second)"
        )
    if data.resize == "none":
        candidates = [one for one in candidates if size_of(one)[1] <= seen.height and size_of(one)[2] <= seen.width]
        if not candidates:
            raise ClipError(f"too small for every bucket with data.resize=none: {seen.width}x{seen.height}")
    return min(candidates, key=lambda bucket: _cost(seen, size_of(bucket), data.resize))


def _cost(seen: Look, size: Size, resize: str) -> tuple[float, int, bool, int]:
    frames, height, width = size
    if resize == "none":
        lost = 1 - height * width / (seen.height * seen.width)
    else:
        # What "cover" cuts off; for "stretch" as good a measure of what is distorted.
        lost = 1 - math.exp(-abs(math.log(seen.height * width / (seen.width * height))))
    upscaled = height > seen.height or width > seen.width
    return round(lost, 2), -frames, upscaled, height * width if upscaled else -height * width


def in_order(buckets: Sequence[str]) -> list[str]:
    """Distinct ``buckets``, those with the longest sequences first."""
    return sorted(set(buckets), key=lambda bucket: (-math.prod(size_of(bucket)), bucket))
