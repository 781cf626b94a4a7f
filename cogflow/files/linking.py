"""Put a large file in a second place without its bytes being read: a reflink, a hard link, or else a copy."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from cogflow.errors import StorageError
from cogflow.files.uncached_io import UncachedWriter

MODES = ("auto", "hard", "copy")
FICLONE = 0x40049409
"""ioctl of linux/fs.h: the target shares the source's extents until one of them is written (btrfs, XFS, bcachefs, overlays of them)."""
PIECE = 1 << 22


def place_file(
    source: Path, target: Path, mode: str, sha256: str, advance: Callable[[int, str], None] | None = None
) -> str:
    """Make ``target`` hold what ``source`` holds; returns how: reflink, hard or copy. ``target`` must not exist.

    ``mode``: auto (a reflink, else a hard link, else a copy), hard (or nothing), copy. ``sha256`` is the source's: a copy whose bytes
    on the way do not have it is refused. ``advance`` is told of (bytes, name) of a copy. Raises :class:`StorageError`.
    """
    if mode == "auto" and _reflink(source, target):
        return "reflink"
    if mode != "copy":
        try:
            os.link(source, target)
            return "hard"
        except OSError as error:  # another file system, or one without hard links, or a file of another owner
            if mode == "hard":
                raise StorageError(
                    f"{source} cannot be hard-linked to {target.parent}: {error.strerror}.",
                    "Hard links need one file system and your own files; stage.link=copy copies, stage.link=auto does what can be done.",
                ) from error
    _copy(source, target, sha256, advance)
    return "copy"


def can_link(source: Path, folder: Path) -> bool:
    """Whether ``folder`` can get a reflink or a hard link to ``source``, found out by making one and removing it."""
    probe = folder / f".link-probe-{os.getpid()}"
    try:
        if _reflink(source, probe):
            return True
        os.link(source, probe)
        return True
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _reflink(source: Path, target: Path) -> bool:
    try:
        import fcntl
    except ImportError:
        return False
    try:
        with open(source, "rb") as taken, open(target, "xb") as made:
            fcntl.ioctl(made.fileno(), FICLONE, taken.fileno())
        return True
    except OSError:
        with contextlib.suppress(OSError):
            if target.stat().st_size == 0:
                target.unlink()
        return False


def _copy(source: Path, target: Path, sha256: str, advance: Callable[[int, str], None] | None) -> None:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE))
    writer = UncachedWriter(target, "xb")
    try:
        with open(source, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                writer.write(buffer[:count])
                if advance is not None:
                    advance(count, source.name)
    finally:
        writer.close()
    if digest.hexdigest() != sha256:
        raise StorageError(
            f"{source} changed while it was copied.", "Is somebody still writing it? Assemble again when it is whole."
        )
