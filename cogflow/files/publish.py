"""Publish a folder in one step: it is not visible, or complete with a manifest, whenever the process dies."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from cogflow.errors import StorageError
from cogflow.files.atomic_write import remove, remove_leftovers, storage_errors, sync, sync_tree
from cogflow.files.manifest import write_manifest


@contextlib.contextmanager
def publish_folder(target: Path, *, replace: bool = False, known: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Yield a hidden folder beside ``target`` to write into.

    It becomes ``target`` when the block ends without an error.

    The folder gets a ``manifest.json`` (see :mod:`cogflow.files.manifest`). When the block raises, nothing is visible
    and an existing ``target`` is unchanged. With ``replace`` an existing ``target`` is moved aside when the new folder
    is complete and synced, and removed when the new one is in place.

    ``known``: sha256 by relative path of files that the block hashed while it wrote them; the block may fill it.

    Only one process may publish a target at a time; a group of ranks must see to that itself.

    Raises :class:`StorageError` when ``target`` exists and may not be replaced, or when the disk refuses.
    """
    target = Path(target)
    if os.path.lexists(target) and not replace:
        raise StorageError(f"{target} exists already.", "Choose another folder, or remove this one.")
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    try:
        with storage_errors(target):
            yield partial
            write_manifest(partial, known)
            sync_tree(partial)
            _swap(partial, target)
    except BaseException:
        remove(partial)
        raise


def _swap(partial: Path, target: Path) -> None:
    """Rename ``partial`` to ``target``, which may exist."""
    if not os.path.lexists(target):
        partial.rename(target)
        sync(target.parent)
        return
    if _exchange(partial, target):
        sync(target.parent)
        remove(partial)
        return
    # The file system cannot exchange names. A kill between the two renames leaves the old folder under a hidden name,
    # from which remove_leftovers() restores it.
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    sync(target.parent)
    remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step (Linux's ``renameat2``). False where the system cannot."""
    current_folder = -100  # AT_FDCWD
    exchange = 2  # RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(current_folder, os.fsencode(one), current_folder, os.fsencode(other), exchange) == 0)
