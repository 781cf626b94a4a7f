"""Open videos and pictures of unknown origin; nothing else in cogflow does.

``tests/house/test_media_access.py`` finds other places. libav gets a file object and no path, one demuxer that the
first bytes of the file choose, and no way to open a second file. A walk over the structure of the file bounds what
libav would build from it and hides what it does not need.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import av
from PIL import Image

from cogflow.data import matroska_layout, mp4_layout
from cogflow.data.media_bytes import ClipError, MediaBytes, MediaLayout

MAX_PIXELS = 8192 * 4352
"""Pixels of one frame or picture. The largest 8K format, 8192x4320, fits."""
PICTURE_FORMATS = ("PNG", "JPEG")
"""The decoders of Pillow that pictures may use."""

_LAYOUTS = {"mov": mp4_layout.read_layout, "matroska": matroska_layout.read_layout}
_COMMON_OPTIONS = {
    "max_pixels": str(MAX_PIXELS),
    "protocol_whitelist": "none",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm",
}
_OPTIONS = {
    "mov": _COMMON_OPTIONS | {"enable_drefs": "0", "use_absolute_path": "0"},
    "matroska": _COMMON_OPTIONS,
}
_MP4_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"styp", b"wide", b"free", b"skip", b"pnot")
_MATROSKA_MAGIC = b"\x1a\x45\xdf\xa3"
_BUFFER_BYTES = 256 * 1024
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def file_size(path: Path) -> int:
    """Return the size of a regular file in bytes, without opening it.

    Raises :class:`ClipError` for a missing or empty file, and for folders, pipes, sockets and devices.
    """
    try:
        return _checked_size(path.stat())
    except FileNotFoundError:
        raise ClipError("the file is missing") from None
    except OSError as error:
        raise ClipError(f"cannot be opened: {error.strerror}") from None


@contextmanager
def open_media(path: Path) -> Iterator[av.container.InputContainer]:
    """Open a video of MP4, MOV, Matroska or WebM for reading, for the duration of the ``with`` block.

    The codec contexts refuse frames of more than :data:`MAX_PIXELS`. Raises :class:`ClipError` for other files, for
    files that refer to other files, and for files whose tables exceed the limits of the layout modules.
    """
    with _opened(path) as data:
        demuxer = _demuxer(data)
        layout = _LAYOUTS[demuxer](data)
        with av.open(
            _LibavFile(data, layout),
            "r",
            format=demuxer,
            options=_OPTIONS[demuxer],
            metadata_errors="replace",  # titles in other encodings than UTF-8
            buffer_size=_BUFFER_BYTES,
            io_open=_refuse_other_files,
        ) as container:
            for stream in container.streams.video:
                _check_size(stream, layout)
            yield container


@contextmanager
def as_clip_errors() -> Iterator[None]:
    """Turn errors of PyAV, its conversions of numbers and text, and of the file system into :class:`ClipError`."""
    try:
        yield
    except av.error.FFmpegError as error:
        raise ClipError(f"not a readable video (truncated, damaged or of another kind): {error.strerror}") from None
    except OSError as error:
        raise ClipError(f"cannot be read: {error.strerror or error}") from None
    except (ValueError, ArithmeticError) as error:  # PyAV, for numbers and formats that it cannot represent
        raise ClipError(f"not a readable video (damaged): {error}") from error


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open a PNG or JPEG picture, for the duration of the ``with`` block.

    Raises :class:`ClipError` for other files and for pictures of more than :data:`MAX_PIXELS`.
    """
    with _opened(path) as data, os.fdopen(os.dup(data.handle), "rb") as file:
        try:
            picture = Image.open(file, formats=PICTURE_FORMATS)
        except Image.DecompressionBombError:
            raise ClipError("the picture is too large") from None
        except (OSError, ValueError, SyntaxError):
            raise ClipError(f"not a readable picture ({', '.join(PICTURE_FORMATS)})") from None
        with picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ClipError(f"{picture.width}x{picture.height} pixels; at most {MAX_PIXELS:,} pixels are decoded")
            yield picture


@contextmanager
def _opened(path: Path) -> Iterator[MediaBytes]:
    """Open a regular file without blocking. Opening a device can have effects, so its kind is checked before, too."""
    file_size(path)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise ClipError(f"cannot be opened: {error.strerror}") from None
    try:
        yield MediaBytes(handle, _checked_size(os.fstat(handle)))
    finally:
        os.close(handle)


def require_regular(status: os.stat_result) -> None:
    """Raise :class:`ClipError` for folders, pipes, sockets and devices, which cannot be read to an end."""
    kind = next((name for test, name in _KINDS if test(status.st_mode)), None)
    if kind is not None:
        raise ClipError(f"{kind}, not a regular file")
    if not stat.S_ISREG(status.st_mode):
        raise ClipError("not a regular file")


def _checked_size(status: os.stat_result) -> int:
    require_regular(status)
    if status.st_size == 0:
        raise ClipError("0 bytes")
    return status.st_size


def _demuxer(data: MediaBytes) -> str:
    """Return the demuxer for the first bytes of a file; its name does not count."""
    first = data.read_at(0, 8)
    if first.startswith(_MATROSKA_MAGIC):
        return "matroska"
    if first[4:] in _MP4_FIRST_BOXES:
        return "mov"
    raise ClipError("not a readable video: neither MP4 or MOV nor Matroska or WebM, or its header is damaged")


def _check_size(stream: av.VideoStream, layout: MediaLayout) -> None:
    codec = stream.codec_context
    if codec is None:
        return
    if codec.width * codec.height > MAX_PIXELS:
        raise ClipError(f"frames of {codec.width}x{codec.height}; at most {MAX_PIXELS:,} pixels are decoded")
    if layout.stated_pixels and codec.width * codec.height > 4 * layout.stated_pixels:
        raise ClipError(
            f"lying header: it states frames of {layout.stated_pixels:,} pixels, "
            f"the stream has {codec.width}x{codec.height}"
        )
    codec.options = {"max_pixels": str(MAX_PIXELS)}


def _refuse_other_files(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise ClipError("refers to another file, which is not opened")


@dataclass
class _LibavFile:
    """The file as libav reads it: without a name, and with the hidden parts of the layout renamed."""

    _data: MediaBytes
    _layout: MediaLayout
    _position: int = 0

    def __post_init__(self) -> None:
        self._hidden = sorted(self._layout.hidden)

    def read(self, count: int) -> bytes:
        start = self._position
        found = self._data.read_at(start, count)
        self._position = start + len(found)
        return self._with_hidden(start, found)

    def _with_hidden(self, start: int, found: bytes) -> bytes:
        """Return ``found``, the bytes from ``start`` on, with the replacements that overlap them."""
        # No replacement is longer than four bytes, so one that begins up to three bytes earlier can reach in.
        first, last = bisect_left(self._hidden, start - 3), bisect_left(self._hidden, start + len(found))
        if first == last:
            return found
        changed = bytearray(found)
        for offset in self._hidden[first:last]:
            for place, value in enumerate(self._layout.hidden[offset], start=offset - start):
                if 0 <= place < len(changed):
                    changed[place] = value
        return bytes(changed)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._data.size}[whence]
        if base + offset < 0:
            raise OSError(22, "negative position")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position
