"""What the packets of a video file say before anything is decoded: whether it is whole, how long it is, and its size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from cogflow.data.video import to_rgb

TOLERANCE = 1e-3  # seconds; webm and mkv round times to milliseconds
_MAX_PIXELS = 8192 * 8192


class ClipError(Exception):
    """This clip cannot be used; ``reason`` says why in a few words. The caller decides whether that ends the run."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Scan:
    """What the packets of a file say, whatever its header claims. Times in seconds; ``end`` is where the last frame ends."""

    times: np.ndarray
    end: float
    distinct: bool = True  # whether no two frames have one time

    def holds(self, frames: int, fps: float) -> bool:
        """Whether there are ``frames`` frames at ``fps`` a second: the last one is wanted while a frame is shown."""
        last_wanted = float(self.times[0]) + (frames - 1) / fps
        return last_wanted < self.end - TOLERANCE or last_wanted <= float(self.times[-1]) + TOLERANCE

    @property
    def fps(self) -> float:
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


@dataclass(frozen=True)
class Look:
    """A clip's own size as displayed, and how long it is: what settles its bucket."""

    height: int
    width: int
    scan: Scan

    @property
    def seconds(self) -> float:
        return self.scan.end - float(self.scan.times[0])

    def holds(self, frames: int, fps: float) -> bool:
        return self.scan.holds(frames, fps)


def look(path: Path) -> Look:
    """Walk through the packets of a file and decode its first frame. Raises :class:`ClipError`."""
    with as_clip_errors():
        size = file_size(path)
        with av.open(str(path)) as container:
            scan = scan_packets(container, size)
        with av.open(str(path)) as container:
            first = next(container.decode(container.streams.video[0]), None)
        if first is None:
            raise ClipError("holds no frame")
        height, width, _ = to_rgb(first).shape
    return Look(height, width, scan)


def file_size(path: Path) -> int:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ClipError("the file is missing") from None
    except OSError as error:
        raise ClipError(f"cannot be opened: {error.strerror}") from None
    if size == 0:
        raise ClipError("0 bytes")
    return size


@contextmanager
def as_clip_errors() -> Iterator[None]:
    """What PyAV and the file system raise, in our words."""
    try:
        yield
    except av.error.FFmpegError as error:
        raise ClipError(f"not a readable video (truncated, damaged or of another kind): {error.strerror}") from None
    except OSError as error:
        raise ClipError(f"cannot be read: {error.strerror or error}") from None


def scan_packets(container: av.container.InputContainer, size: int, held: list[av.Packet] | None = None) -> Scan:
    """Walk through the packets of a file of ``size`` bytes without decoding them; all of them go into ``held``."""
    if not container.streams.video:
        raise ClipError("holds no video stream (or its header is damaged)")
    stream = container.streams.video[0]
    codec = stream.codec_context
    if codec is None:
        raise ClipError("truncated, or of a codec that is not known here")
    if codec.width * codec.height > _MAX_PIXELS:
        raise ClipError(f"the header claims frames of {codec.width}x{codec.height}")
    index = getattr(stream, "index_entries", ())  # older PyAV: incomplete packets still tell most truncations
    if container.format.name.startswith("mov") and any(index[i].pos + index[i].size > size for i in range(len(index))):
        raise ClipError("truncated: the header lists frames beyond the end of the file")
    claimed = _claimed_seconds(stream)
    base = float(stream.time_base or 0)
    times, ends = [], []
    for packet in container.demux(stream):
        if held is not None:
            held.append(packet)
        if packet.is_corrupt:
            raise ClipError("truncated or damaged: a frame is incomplete")
        if packet.pts is None or packet.is_discard:
            continue
        times.append(packet.pts * base)
        ends.append((packet.pts + (packet.duration or 0)) * base)
    if not times:
        raise ClipError("holds no frame")
    stamps = np.unique(np.array(times))
    if len(stamps) == 1:
        raise ClipError("one frame only")
    typical = float(np.median(np.diff(stamps)))
    end = max(max(ends), float(stamps[-1]) + typical)
    if claimed is not None and end - stamps[0] < 0.95 * claimed - 2 * typical:
        raise ClipError(f"truncated or lying header: claims {claimed:.2f} s, holds {end - stamps[0]:.2f} s")
    return Scan(stamps, end, len(stamps) == len(times))


def _claimed_seconds(stream: av.VideoStream) -> float | None:
    """The length Matroska and WebM write beside each stream. MP4 is checked by its own table, frame by frame."""
    text = stream.metadata.get("DURATION", "")
    try:
        hours, minutes, seconds = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None
