"""Choose the size of each clip from ``data.buckets``: the one that cuts off the least of the clip."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cogflow.config.data_section import DataConfig
from cogflow.data.media_bytes import ClipError
from cogflow.data.video_decoding import ClipProperties, inspect_clip

Size = tuple[int, int, int]
"""Frames, height, width."""


def parse_bucket(bucket: str) -> Size:
    """Return the numbers of a bucket like ``"49x480x720"``. Raises ``ValueError`` for anything else."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", bucket, re.ASCII):
        raise ValueError(bucket)
    frames, height, width = map(int, bucket.split("x"))
    return frames, height, width


def bucket_sizes(data: DataConfig) -> list[Size]:
    """Return the sizes at which clips are prepared: those of the buckets, or the single size of ``data``."""
    return [parse_bucket(bucket) for bucket in data.buckets] or [(data.frames, data.height, data.width)]


def at_bucket_size(data: DataConfig, bucket: str | None) -> DataConfig:
    """Return ``data`` at the size of ``bucket``; unchanged without a bucket."""
    if bucket is None:
        return data
    frames, height, width = parse_bucket(bucket)
    return replace(data, frames=frames, height=height, width=width)


def assign_bucket(path: Path, data: DataConfig) -> str:
    """Return the bucket of the clip at ``path``.

    Raises :class:`ClipError` for a clip that cannot be read or fits no bucket.
    """
    return choose_bucket(inspect_clip(path), data)


def choose_bucket(clip: ClipProperties, data: DataConfig) -> str:
    """Return the bucket for a clip. Raises :class:`ClipError` when none fits.

    Only buckets are considered for whose frames the clip is long enough. The bucket that cuts off the least of the
    picture is chosen; among those within one percent, the bucket with the most frames; then the largest for which the
    clip is not scaled up.
    """
    candidates = [bucket for bucket in data.buckets if clip.scan.holds(parse_bucket(bucket)[0], data.fps)]
    if not candidates:
        shortest = min(parse_bucket(bucket)[0] for bucket in data.buckets)
        raise ClipError(
            f"too short for every bucket: has {clip.seconds:.2f} s, the shortest takes {shortest / data.fps:.2f} s "
            f"({shortest} frames at {data.fps:g} a second)"
        )
    if data.resize == "none":
        candidates = [
            bucket
            for bucket in candidates
            if parse_bucket(bucket)[1] <= clip.height and parse_bucket(bucket)[2] <= clip.width
        ]
        if not candidates:
            raise ClipError(f"too small for every bucket with data.resize=none: {clip.width}x{clip.height}")
    return min(candidates, key=lambda bucket: _cost(clip, parse_bucket(bucket), data.resize))


def _cost(clip: ClipProperties, size: Size, resize: str) -> tuple[float, int, bool, int]:
    frames, height, width = size
    if resize == "none":
        lost = 1 - height * width / (clip.height * clip.width)
    else:
        # The share of the picture that "cover" cuts off. The same number measures the distortion by "stretch".
        lost = 1 - math.exp(-abs(math.log(clip.height * width / (clip.width * height))))
    upscaled = height > clip.height or width > clip.width
    return round(lost, 2), -frames, upscaled, height * width if upscaled else -height * width


def longest_first(buckets: Sequence[str]) -> list[str]:
    """Return the distinct ``buckets``, those with the longest sequences first."""
    return sorted(set(buckets), key=lambda bucket: (-math.prod(parse_bucket(bucket)), bucket))
