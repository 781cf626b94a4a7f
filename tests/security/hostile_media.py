"""Make small sound videos, and change their boxes and elements."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CONTAINERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"mvex", b"moof", b"traf"}
TABLES = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


def write_sound(path: Path, frames: int = 12, codec: str = "libx264", muxer: dict[str, str] | None = None) -> Path:
    """Write ``frames`` frames of 64x64 at 8 per second, each with a grey level of its own."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(8))
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.options = {"crf": "30", "g": "4", "threads": "1"}
        for index in range(frames):
            image = np.full((64, 64, 3), 10 + 8 * (index % 28), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def box(kind: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def full_box(kind: bytes, *content: bytes, flags: int = 0) -> bytes:
    return box(kind, struct.pack(">I", flags), *content)


def change_box(content: bytes, names: tuple[bytes, ...], change: Callable[[bytes], bytes]) -> bytes:
    """Return ``content`` with the box at the path ``names`` replaced by ``change(box)``; sizes around it follow."""
    result, place, found = b"", 0, False
    while place + 8 <= len(content):
        size, kind = struct.unpack(">I4s", content[place : place + 8])
        whole = content[place : place + size]
        if kind == names[0] and not found:
            found = True
            whole = change(whole) if len(names) == 1 else box(kind, change_box(whole[8:], names[1:], change))
        result += whole
        place += size
    assert found, f"no box {names[0]!r}"
    return result + content[place:]


def element(name: int, *content: bytes) -> bytes:
    """Return a Matroska element with a size of eight bytes."""
    body = b"".join(content)
    return name.to_bytes((name.bit_length() + 7) // 8, "big") + (2**56 | len(body)).to_bytes(8, "big") + body


def split_matroska(content: bytes) -> tuple[bytes, bytes]:
    """Return the EBML header, and the content of the segment of a file that libav wrote."""
    at = content.index(b"\x18\x53\x80\x67")
    return content[:at], content[at + 12 :]
