"""sha256 of files: of one, of many at once, and of large files that were hashed before.

A T5 of 19 GB is part of every pipeline and never changes, so hashes of large files are kept in the user's cache folder.
A file is recognised by device, inode, size and time of the last change, as git does. A change under the same time is
not noticed; ``stage.rehash=true`` reads every file again.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cogflow.errors import StorageError, UserError
from cogflow.files.record_io import RawRecord, Record, read_record, write_record

PIECE = 1 << 22
"""Bytes read at a time. hashlib releases the interpreter's lock while it hashes them."""
MAX_THREADS = 8
"""More threads are not faster than the disk that one folder is on."""
SMALLEST_CACHED = 1 << 24
"""Bytes of the smallest file whose hash is cached."""
MAX_CACHED = 4096
"""Number of cached hashes; the oldest are dropped."""
SETTLED_NS = 2 * 10**9
"""Hashes of files that changed within this time are not cached: another change could have the same time."""

Advance = Callable[[int, str], None]
"""Called with (bytes, file name) as bytes are hashed; never by two threads at once."""


@dataclass(frozen=True)
class HashCache(Record):
    """``hashes.json``: sha256 by file mark (device, inode, size, time of the last change), oldest first."""

    file_name: ClassVar[str] = "hashes.json"

    hashes: dict[str, str]

    @classmethod
    def upgrade(cls, values: RawRecord, version: int) -> RawRecord:
        """Version 0 holds the hashes at the top."""
        return {"hashes": values}


def hash_file(path: Path) -> str:
    """Return the sha256 of a file in hex. Raises :class:`OSError` for a file that cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(PIECE):
            digest.update(chunk)
    return digest.hexdigest()


def hash_files(paths: Iterable[Path], advance: Advance | None = None) -> dict[Path, str]:
    """Return the sha256 in hex by path, hashed in several threads with a few MiB of memory each.

    The largest files are started first, so that no thread is left alone with one at the end. One core hashes about 1.5
    GB a second; disks of clusters are faster. Raises :class:`OSError` for a file that cannot be read.
    """
    sizes = {path: path.stat().st_size for path in paths}
    lock, stop = threading.Lock(), threading.Event()

    def hash_one(path: Path) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(min(PIECE, max(1, sizes[path]))))
        with path.open("rb", buffering=0) as file:
            while (count := file.readinto(buffer)) and not stop.is_set():
                digest.update(buffer[:count])
                if advance is not None:
                    with lock:
                        advance(count, path.name)
        return digest.hexdigest()

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="hash") as pool:
        futures = {path: pool.submit(hash_one, path) for path in sorted(sizes, key=lambda path: -sizes[path])}
        try:
            return {path: future.result() for path, future in futures.items()}
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def hash_with_cache(
    paths: Iterable[Path], advance: Advance | None = None, *, rehash: bool = False
) -> tuple[dict[Path, str], int]:
    """Return the sha256 by path, and how many bytes of them came from the cache.

    ``rehash``: read every file, whatever the cache holds. ``advance`` is called for cached files at once. A cache that
    cannot be read or written only costs time.
    """
    paths = list(paths)
    cached = _read_cache()
    marks = {path: _mark(path) for path in paths}
    found: dict[Path, str] = {}
    known = 0
    for path, mark in marks.items():
        size = path.stat().st_size
        if rehash or mark not in cached or size < SMALLEST_CACHED:
            continue
        found[path] = cached[mark]
        known += size
        if advance is not None:
            advance(size, path.name)
    fresh = hash_files([path for path in paths if path not in found], advance)
    settled_before = time.time_ns() - SETTLED_NS
    for path, sha256 in fresh.items():
        facts = path.stat()
        settled = facts.st_mtime_ns < settled_before and _mark(path) == marks[path]
        if settled and facts.st_size >= SMALLEST_CACHED:
            cached.pop(marks[path], None)
            cached[marks[path]] = sha256
    if fresh:
        _write_cache(dict(list(cached.items())[-MAX_CACHED:]))
    return found | fresh, known


def cache_file() -> Path:
    """Return ``$XDG_CACHE_HOME/cogflow/hashes.json``, by default below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cogflow" / HashCache.file_name


def _mark(path: Path) -> str:
    facts = path.stat()
    return f"{facts.st_dev}:{facts.st_ino}:{facts.st_size}:{facts.st_mtime_ns}"


def _read_cache() -> dict[str, str]:
    try:
        return dict(read_record(cache_file(), HashCache).hashes)
    except (OSError, UserError):
        return {}


def _write_cache(hashes: dict[str, str]) -> None:
    try:
        write_record(cache_file(), HashCache(hashes))
    except (OSError, StorageError):
        return
