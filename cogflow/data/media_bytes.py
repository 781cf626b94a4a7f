"""The bytes of an open media file, what a walk over its structure returns, and the error for an unusable file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

MAX_FRAMES = 2**20
"""Frames of one video: almost five hours at 60 frames per second."""


class ClipError(Exception):
    """Error for an unusable clip, with a short ``reason``. The caller decides whether it ends the run."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class MediaBytes:
    """A regular file that is open for reading as ``handle``. ``size``: its bytes when it was opened."""

    handle: int
    size: int

    def read_at(self, offset: int, count: int) -> bytes:
        """Return up to ``count`` bytes at ``offset``; fewer at the end of the file."""
        return os.pread(self.handle, max(0, min(count, self.size - offset)), offset)


@dataclass
class MediaLayout:
    """``hidden``: bytes that libav reads in place of those at an offset, at most four, so that it skips that part.

    ``stated_pixels``: pixels of a frame by the container's header; 0: not known.
    """

    hidden: dict[int, bytes] = field(default_factory=dict)
    stated_pixels: int = 0
