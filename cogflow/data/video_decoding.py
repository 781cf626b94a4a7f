"""Decode the frames of a video file that are shown at wanted times, after a check of its packets.

Packets are read first, without decoding: they show whether the file is complete, how long it is, and which frames are
needed. Frames that are neither wanted nor referred to by other frames (most B-frames) are not decoded. One thread
decodes one file, because decoding several files at a time is more efficient than several threads on one file.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from cogflow.data.media import as_clip_errors, file_size, open_media
from cogflow.data.media_bytes import MAX_FRAMES, ClipError
from cogflow.data.video import to_rgb

TOLERANCE = 1e-3
"""Seconds by which time stamps may differ: webm and mkv round times to milliseconds."""

_SEEK_SECONDS = 4.0  # below, decoding from the start is as fast as seeking
_HELD_BYTES = 64 * 2**20  # larger files are read twice instead of being held in memory
_HELD_PACKETS = 2**16  # each takes some hundred bytes besides its data
_SLACK_BYTES = 2**20
_DECODED_PIXELS = 5 * 10**9
_DECODED_PIXELS_PER_BYTE = 20_000
_THREADED_PIXELS = 4096 * 2304  # libav's threads hold a frame each


class IncompleteError(Exception):
    """Error for a wanted frame that the decoder did not return although its packet is there."""


@dataclass(frozen=True)
class PacketScan:
    """Time stamps of all frames, read from the packets and not from the header.

    ``times``: sorted, in seconds. ``end``: end of the last frame, in seconds. ``distinct``: True when no two frames
    have the same time stamp.
    """

    times: np.ndarray
    end: float
    distinct: bool = True

    def holds(self, frames: int, fps: float) -> bool:
        """Return whether the file is long enough for ``frames`` frames at ``fps`` per second."""
        last_wanted = float(self.times[0]) + (frames - 1) / fps
        return last_wanted < self.end - TOLERANCE or last_wanted <= float(self.times[-1]) + TOLERANCE

    @property
    def fps(self) -> float:
        """Mean number of frames per second."""
        return float((len(self.times) - 1) / (self.times[-1] - self.times[0]))


@dataclass(frozen=True)
class ClipProperties:
    """Size of a clip in pixels, as displayed, and its time stamps."""

    height: int
    width: int
    scan: PacketScan

    @property
    def seconds(self) -> float:
        return self.scan.end - float(self.scan.times[0])


@dataclass
class DecodingBudget:
    """Pixels that may still be decoded for one clip: :func:`pixel_budget` of its file at the start."""

    left: int

    def spend(self, stream: av.VideoStream) -> None:
        """Count one frame of ``stream``. Raises :class:`ClipError` when the budget is exhausted."""
        codec = stream.codec_context
        self.left -= codec.width * codec.height
        if self.left < 0:
            raise ClipError(
                "the wanted frames need too many others: far more pixels are decoded than its size makes plausible"
            )


def pixel_budget(size: int) -> int:
    """Return how many pixels may be decoded of a file of ``size`` bytes.

    Static recordings of screens, the most compressed real videos, have up to 10,000 pixels per byte.
    """
    return _DECODED_PIXELS + _DECODED_PIXELS_PER_BYTE * size


@dataclass
class OpenVideo:
    """An open file whose packets were read; ``packets`` are kept in memory when the file is small."""

    path: Path
    scan: PacketScan
    stream: av.VideoStream
    packets: list[av.Packet[av.VideoStream]] | None
    budget: DecodingBudget


def inspect_clip(path: Path) -> ClipProperties:
    """Return size and time stamps of a clip: read its packets and decode its first frame. Raises :class:`ClipError`."""
    with as_clip_errors():
        size = file_size(path)
        with open_media(path) as container:
            scan = scan_packets(container, size)
        with open_media(path) as container:
            first = next(decode_frames(container, DecodingBudget(pixel_budget(size))), None)
        if first is None:
            raise ClipError("holds no frame")
        height, width, _ = to_rgb(first).shape
    return ClipProperties(height, width, scan)


def open_video(path: Path, size: int, stack: ExitStack) -> OpenVideo:
    """Open the file of ``size`` bytes until ``stack`` closes, and read its packets. Raises :class:`ClipError`."""
    container = stack.enter_context(open_media(path))
    packets: list[av.Packet[av.VideoStream]] | None = [] if size <= _HELD_BYTES else None
    scan = scan_packets(container, size, packets)
    held = packets if packets is not None and len(packets) <= _HELD_PACKETS else None
    return OpenVideo(path, scan, container.streams.video[0], held, DecodingBudget(pixel_budget(size)))


def decode_frames(container: av.container.InputContainer, budget: DecodingBudget) -> Iterator[av.VideoFrame]:
    """Yield the frames of the first video stream from where ``container`` stands, within ``budget``."""
    stream = container.streams.video[0]
    for packet in container.demux(stream):
        budget.spend(stream)
        yield from packet.decode()


def scan_packets(
    container: av.container.InputContainer, size: int, held: list[av.Packet[av.VideoStream]] | None = None
) -> PacketScan:
    """Read all packets of a file of ``size`` bytes without decoding them, and append up to 65,537 of them to ``held``.

    Raises :class:`ClipError` for a file that is truncated or damaged, or whose header claims what the packets do not
    hold.
    """
    stream = _checked_stream(container, size)
    claimed = _claimed_seconds(stream)
    base = float(stream.time_base or 0)
    times, ends = array("d"), array("d")
    bytes_left, packets = 2 * size + _SLACK_BYTES, 0
    for packet in container.demux(stream):
        packets += 1
        bytes_left -= packet.size
        if packets > MAX_FRAMES:
            raise ClipError(f"holds more than {MAX_FRAMES:,} frames")
        if bytes_left < 0:
            raise ClipError(f"its tables name the same bytes many times: more frames than {size:,} bytes can hold")
        if held is not None and len(held) <= _HELD_PACKETS:
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
    return PacketScan(stamps, end, len(stamps) == len(times))


def _checked_stream(container: av.container.InputContainer, size: int) -> av.VideoStream:
    """Return the video stream of ``container`` after a check of its header against the ``size`` of the file."""
    if not container.streams.video:
        raise ClipError("holds no video stream (or its header is damaged)")
    stream = container.streams.video[0]
    codec = stream.codec_context
    if codec is None:
        raise ClipError("truncated, or of a codec that is not known here")
    # Older PyAV has no index; there, incomplete packets show most truncations.
    index = getattr(stream, "index_entries", ())
    if container.format.name.startswith("mov") and any(index[i].pos + index[i].size > size for i in range(len(index))):
        raise ClipError("truncated: the header lists frames beyond the end of the file")
    return stream


def _claimed_seconds(stream: av.VideoStream) -> float | None:
    """Return the length in seconds that Matroska and WebM files state for each stream; None for other files.

    MP4 files have a table of frames instead, which :func:`_checked_stream` checks.
    """
    text = stream.metadata.get("DURATION", "")
    try:
        hours, minutes, seconds = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None


def decode_needed(file: OpenVideo, wanted: np.ndarray) -> Iterator[tuple[av.VideoFrame, int]]:
    """Yield the frames shown at the ``wanted`` times (seconds), each with the number of times that it is wanted.

    Other frames are decoded only when wanted frames refer to them. The frames equal those of :func:`decode_all` when
    the file is sound. Raises :class:`IncompleteError` when it is not; the frames yielded before are then invalid.
    """
    scan = file.scan
    if not scan.distinct:
        raise IncompleteError
    places, counts = np.unique(np.searchsorted(scan.times - TOLERANCE, wanted, side="right") - 1, return_counts=True)
    left = dict(zip(scan.times[places].tolist(), counts.tolist(), strict=True))
    with ExitStack() as stack:
        stream, packets = _packets_from(file, float(wanted[0]), stack)
        stream.thread_type = "NONE"
        codec = stream.codec_context
        codec.thread_count = 1
        base = float(stream.time_base or 0)
        for packet in packets:
            # The decoder returns a frame some packets later, so wanted frames are recognised by their time.
            codec.skip_frame = "NONREF" if packet.pts is not None and packet.pts * base not in left else "DEFAULT"
            file.budget.spend(stream)
            for frame in packet.decode():
                if frame.pts is None:
                    raise ClipError("frames carry no time stamps")
                time = frame.pts * base
                if time in left and time != next(iter(left)):
                    raise IncompleteError
                if count := left.pop(time, 0):
                    yield frame, count
                if not left:
                    return
    raise IncompleteError


def _packets_from(
    file: OpenVideo, start: float, stack: ExitStack
) -> tuple[av.VideoStream, Iterator[av.Packet[av.VideoStream]]]:
    """Return the stream to decode, and its packets from a key frame at or before ``start`` (seconds) on."""
    stream, packets = file.stream, file.packets
    base = float(stream.time_base or 0)
    far = start - float(file.scan.times[0]) > _SEEK_SECONDS
    if packets is not None:
        keys = [
            place
            for place, packet in enumerate(packets)
            if packet.is_keyframe and packet.pts is not None and packet.pts * base <= start
        ]
        return stream, iter(packets[keys[-1] if far and keys else 0 :])
    container = stack.enter_context(open_media(file.path))
    stream = container.streams.video[0]
    if far:
        container.seek(int(start / base), stream=stream)
    return stream, container.demux(stream)


def decode_all(file: OpenVideo, wanted: np.ndarray) -> Iterator[tuple[av.VideoFrame, int]]:
    """Yield the same as :func:`decode_needed`, but decode every frame: for unsound files.

    The packets are used only to seek.
    """
    scan = file.scan
    with open_media(file.path) as container:
        stream = container.streams.video[0]
        small = stream.codec_context.width * stream.codec_context.height <= _THREADED_PIXELS
        stream.thread_type = "AUTO" if small else "NONE"
        base = float(stream.time_base or 0)
        if wanted[0] - scan.times[0] > _SEEK_SECONDS:
            container.seek(int(wanted[0] / base), stream=stream)
        frames = decode_frames(container, file.budget)
        shown: av.VideoFrame | None = None
        done = 0
        for frame in frames:
            if frame.pts is None:
                raise ClipError("frames carry no time stamps")
            upcoming = frame.pts * base
            if shown is None and upcoming > wanted[0] + TOLERANCE:
                raise ClipError("damaged: the first wanted frame does not decode")
            # `shown` stays on screen until `upcoming`, so it serves all wanted times before that.
            until = int(np.searchsorted(wanted, upcoming - TOLERANCE, side="left"))
            if shown is not None and until > done:
                yield shown, until - done
                done = until
            if done == len(wanted):
                return
            shown = frame
        if shown is not None:
            # When the decoder stopped before the last packet's frame, this frame must not be repeated for the rest.
            if float(shown.pts or 0) * base < min(float(wanted[-1]), float(scan.times[-1])) - 1.5 / scan.fps:
                return
            yield shown, len(wanted) - done
