"""Make a large file appear in a second folder without reading its bytes: a reflink, a hard link, or else a copy."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from cogflow.errors import StorageError
from cogflow.files.atomic_write import sync, sync_tree
from cogflow.files.publish import files_below
from cogflow.files.uncached_io import UncachedWriter

MODES = ("auto", "hard", "copy")
FICLONE = 0x40049409
"""ioctl of linux/fs.h: the target shares the source's extents until one of them is written (btrfs, XFS, bcachefs)."""
SMALLEST_LINKED = 1 << 20
"""Bytes of the smallest file that is linked; smaller files are copied."""
PACKAGE = Path(__file__).resolve().parent.parent
"""The folder of this package, whose files are never linked."""
PIECE = 1 << 22
"""Bytes copied at a time."""


def place_file(
    source: Path, target: Path, mode: str, sha256: str, advance: Callable[[int, str], None] | None = None
) -> str:
    """Make ``target`` hold the bytes of ``source`` and return how: reflink, hard or copy. ``target`` must not exist.

    ``mode``: auto (a reflink, else a hard link, else a copy), hard (or an error), copy. Small files and those of this
    package are copied in every mode (:func:`is_copied`). ``sha256`` is the source's: a copy of other bytes is refused.
    ``advance(bytes, name)`` is called while a file is copied. Raises :class:`StorageError`.

    A hard link makes the file read-only under both names, so that an edit in place cannot change the source.
    """
    if is_copied(source, mode):
        _copy(source, target, sha256, advance)
        return "copy"
    if mode == "auto" and _reflink(source, target):
        return "reflink"
    if mode != "copy":
        try:
            target.hardlink_to(source)
            _make_read_only(target)
            return "hard"
        except OSError as error:  # another file system, or one without hard links, or a file of another owner
            if mode == "hard":
                raise StorageError(
                    f"{source} cannot be hard-linked to {target.parent}: {error.strerror}.",
                    "Hard links need one file system and your own files; stage.link=copy copies, "
                    "stage.link=auto does what can be done.",
                ) from error
    _copy(source, target, sha256, advance)
    return "copy"


def is_copied(source: Path, mode: str) -> bool:
    """Return whether ``source`` is copied whatever the file system can do: a small file, or a file of this package."""
    return mode == "copy" or source.stat().st_size < SMALLEST_LINKED or source.resolve().is_relative_to(PACKAGE)


def _make_read_only(path: Path) -> None:
    with contextlib.suppress(OSError):  # a file of another owner, which this user cannot edit either
        path.chmod(path.stat().st_mode & ~0o222)


def link_folder(source: Path, target: Path) -> None:
    """Make the folder ``target``, which must not exist, hold the files of ``source``: hard links, else copies.

    ``target`` appears in one step. Raises ``OSError``.
    """
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in files_below(source):
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, partial / name)
        except OSError:  # a file system without hard links
            shutil.copy2(source / name, partial / name)
    sync_tree(partial)
    partial.rename(target)
    sync(target.parent)


def can_link(source: Path, folder: Path) -> bool:
    """Return whether ``folder`` can get a reflink or a hard link to ``source``. It makes one and removes it."""
    probe = folder / f".link-probe-{os.getpid()}"
    try:
        if not _reflink(source, probe):
            os.link(source, probe)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return True


def _reflink(source: Path, target: Path) -> bool:
    try:
        import fcntl
    except ImportError:
        return False
    try:
        with source.open("rb") as original, target.open("xb") as clone:
            fcntl.ioctl(clone.fileno(), FICLONE, original.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            if target.stat().st_size == 0:
                target.unlink()
        return False
    return True


def _copy(source: Path, target: Path, sha256: str, advance: Callable[[int, str], None] | None) -> None:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE))
    writer = UncachedWriter(target, "xb")
    try:
        with source.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                writer.write(buffer[:count])
                if advance is not None:
                    advance(count, source.name)
    finally:
        writer.close()
    if digest.hexdigest() != sha256:
        raise StorageError(
            f"{source} changed while it was copied.",
            "Is somebody still writing it? Assemble again when it is complete.",
        )
