"""The frames of a file that are shown at the wanted times, decoded on one thread: several clips beside each other waste less than threads.

Frames that are not wanted and that no other frame needs (most B-frames) are not decoded at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from cogflow.data.packet_scan import TOLERANCE, ClipError, Scan, scan_packets

_SEEK_FROM = 4.0  # seconds; below, decoding from the start is as quick
_HELD = 64 * 2**20  # bytes; larger files are read once more instead of being held


class Incomplete(Exception):
    """A wanted frame did not come as the packets promised it."""


@dataclass
class Opened:
    """A file whose packets were walked through; ``packets`` are held where it is small."""

    path: Path
    scan: Scan
    stream: av.VideoStream
    packets: list[av.Packet] | None


def opened(path: Path, size: int, stack: ExitStack) -> Opened:
    """Open the file of ``size`` bytes for as long as ``stack`` lives, and walk through it."""
    container = stack.enter_context(av.open(str(path)))
    packets: list[av.Packet] | None = [] if size <= _HELD else None
    scan = scan_packets(container, size, packets)
    return Opened(path, scan, container.streams.video[0], packets)


def few(file: Opened, wanted: np.ndarray) -> Iterator[tuple[av.VideoFrame, int]]:
    """The frames shown at the ``wanted`` times, each with the number of times it is wanted; others are decoded only where these need them.

    The same frames as :func:`all_` where a file is sound. Raises :class:`Incomplete` where it is not so; then what came is void.
    """
    scan = file.scan
    if not scan.distinct:
        raise Incomplete
    places, counts = np.unique(np.searchsorted(scan.times - TOLERANCE, wanted, side="right") - 1, return_counts=True)
    left = dict(zip(scan.times[places].tolist(), counts.tolist(), strict=True))
    with ExitStack() as stack:
        stream, packets = _from(file, float(wanted[0]), stack)
        stream.thread_type = "NONE"
        codec = stream.codec_context
        codec.thread_count = 1
        base = float(stream.time_base or 0)
        for packet in packets:
            # Frames come after their packets, by then others may be on their way: what is still wanted is asked for by time.
            codec.skip_frame = "NONREF" if packet.pts is not None and packet.pts * base not in left else "DEFAULT"
            for frame in packet.decode():
                if frame.pts is None:
                    raise ClipError("frames carry no time stamps")
                time = frame.pts * base
                if time in left and time != next(iter(left)):
                    raise Incomplete
                if count := left.pop(time, 0):
                    yield frame, count
                if not left:
                    return
    raise Incomplete


def _from(file: Opened, start: float, stack: ExitStack) -> tuple[av.VideoStream, Iterator[av.Packet]]:
    """The stream to decode, and its packets from a key frame at or before ``start`` on."""
    stream, packets = file.stream, file.packets
    base = float(stream.time_base or 0)
    far = start - float(file.scan.times[0]) > _SEEK_FROM
    if packets is not None:
        keys = [
            place
            for place, packet in enumerate(packets)
            if packet.is_keyframe and packet.pts is not None and packet.pts * base <= start
        ]
        return stream, iter(packets[keys[-1] if far and keys else 0 :])
    container = stack.enter_context(av.open(str(file.path)))
    stream = container.streams.video[0]
    if far:
        container.seek(int(start / base), stream=stream)
    return stream, container.demux(stream)


def all_(file: Opened, wanted: np.ndarray) -> Iterator[tuple[av.VideoFrame, int]]:
    """The same with every frame decoded and nothing taken from the packets but where to seek: for files that are not as they should be."""
    scan = file.scan
    with av.open(str(file.path)) as container:
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
