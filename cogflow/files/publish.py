"""Publish a folder in one step, with a manifest of its files.

The folder is not visible, or complete with its ``manifest.json``, whenever the process dies. The manifest holds
size and sha256 of every file, so that a reader can check the folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cogflow.errors import CheckpointError, StorageError
from cogflow.files.atomic_write import remove, remove_leftovers, storage_errors, sync, sync_tree
from cogflow.files.contained_files import create_below
from cogflow.files.hashing import hash_file, hash_files
from cogflow.files.record_io import Record, read_record, record_values


@contextlib.contextmanager
def publish_folder(target: Path, *, replace: bool = False, known: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Yield a hidden folder beside ``target`` to write into.

    It becomes ``target`` when the block ends without an error.

    The folder gets a ``manifest.json``. When the block raises, nothing is visible
    and an existing ``target`` is unchanged. With ``replace`` an existing ``target`` is moved aside when the new folder
    is complete and synced, and removed when the new one is in place.

    ``known``: sha256 by relative path of files that the block hashed while it wrote them; the block may fill it.

    Only one process may publish a target at a time. A group of ranks must choose that process.

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
        made = partial.lstat()
    try:
        with storage_errors(target):
            yield partial
            _require_same(partial, made)
            write_manifest(partial, known)
            sync_tree(partial)
            _require_same(partial, made)
            _swap(partial, target)
    except BaseException:
        remove(partial)
        raise


def _require_same(folder: Path, made: os.stat_result) -> None:
    """Raise :class:`StorageError` when another folder, or a link, has taken the place of the one that was made."""
    found = folder.lstat()
    if (found.st_dev, found.st_ino) != (made.st_dev, made.st_ino):
        raise StorageError(
            f"{folder} was exchanged while it was written.", "Write to a folder that only you can change."
        )


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


MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileHash:
    """sha256 in hex and size of a file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest(Record):
    """``files``: hash and size by path relative to the folder, with forward slashes."""

    file_name: ClassVar[str] = MANIFEST
    advice: ClassVar[str] = "Publish the folder again, or bring its files back."

    files: dict[str, FileHash]


def write_manifest(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Hash every file below ``folder`` into ``folder/manifest.json``.

    ``known``: sha256 by relative path of files that were hashed already.
    """
    known = known or {}
    files = {
        name: FileHash(known.get(name) or hash_file(folder / name), (folder / name).stat().st_size)
        for name in files_below(folder)
        if name != MANIFEST
    }
    text = json.dumps(record_values(Manifest(files)), indent=1) + "\n"
    (folder / MANIFEST).unlink(missing_ok=True)
    with create_below(folder, MANIFEST) as file:
        file.write(text.encode("utf-8"))


def read_manifest(folder: Path) -> Manifest:
    """Return ``folder/manifest.json``. Raises :class:`CheckpointError` for one that is missing or cannot be read."""
    return read_record(folder / MANIFEST, Manifest)


def check_manifest(folder: Path, part: int = 0, of: int = 1) -> list[str]:
    """Return one line for each difference from the manifest; empty when all is as it was published.

    Sizes are compared first, so that a truncated file is found without reading it. A missing or unreadable manifest is
    a problem, too. With ``of`` readers the ``part``-th hashes its shard of the files only, and compares all sizes.
    """
    if not (folder / MANIFEST).is_file():
        return [f"{MANIFEST}: missing"]
    try:
        expected = read_manifest(folder).files
    except CheckpointError as error:
        return [f"{MANIFEST}: unreadable ({error.message})"]
    present = set(files_below(folder)) - {MANIFEST}
    problems = [f"{name}: missing" for name in sorted(expected.keys() - present)]
    problems += [f"{name}: not in the manifest" for name in sorted(present - expected.keys())]
    shard = set(shard_files({name: entry.bytes for name, entry in expected.items()}, part, of))
    to_hash: list[str] = []
    for name in sorted(expected.keys() & present):
        size, path = expected[name].bytes, folder / name
        if path.is_symlink():
            problems.append(f"{name}: a symbolic link in the place of a file")
        elif (found := path.stat().st_size) != size:
            problems.append(f"{name}: {found} bytes, {size} expected")
        elif name in shard:
            to_hash.append(name)
    hashes = hash_files([folder / name for name in to_hash])
    problems += [
        f"{name}: content changed (sha256 differs)"
        for name in to_hash
        if hashes[folder / name] != expected[name].sha256
    ]
    return problems


def shard_files(sizes: Mapping[str, int], part: int, of: int) -> list[str]:
    """Return the names that the ``part``-th of ``of`` readers takes: equal in bytes, and together all of them."""
    loads, names = [0] * of, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        place = loads.index(min(loads))
        loads[place] += sizes[name]
        if place == part:
            names.append(name)
    return names


def files_below(folder: Path) -> list[str]:
    """Return the relative paths of all files below ``folder``, with forward slashes, sorted. Links count as files."""
    names = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        names += [Path(root, name).relative_to(folder).as_posix() for name in [*files, *links]]
    return sorted(names)
