"""sha256 of large files that were read before: a T5 of 19 GB takes part in every pipeline and never changes.

A file is known again by its device, inode, size and time of the last change, as git knows what it need not look at. What changed under
the very same time is not seen, which ``stage.rehash=true`` is for.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from cogflow.errors import StorageError
from cogflow.files.hashing import Advance, hash_files
from cogflow.files.publish import write_json

SMALLEST = 1 << 24
"""Bytes of a file worth remembering."""
MOST = 4096
"""Files remembered; the oldest are forgotten."""
SETTLED_NS = 2 * 10**9
"""A file changed more recently may change again within what its time can tell apart."""


def cache_file() -> Path:
    """``$XDG_CACHE_HOME/cogflow/hashes.json``, by default below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cogflow" / "hashes.json"


def hash_known(
    paths: Iterable[Path], advance: Advance | None = None, *, rehash: bool = False
) -> tuple[dict[Path, str], int]:
    """sha256 by path, and how many bytes of them were known from before. ``rehash``: read every file all the same.

    ``advance`` is told of (bytes, name), known ones at once. A memory that cannot be read or written costs time and nothing else.
    """
    paths = list(paths)
    remembered = _read()
    before = {path: _mark(path) for path in paths}
    found = (
        {}
        if rehash
        else {
            path: remembered[mark]
            for path, mark in before.items()
            if mark in remembered and path.stat().st_size >= SMALLEST
        }
    )
    known = 0
    for path in found:
        known += path.stat().st_size
        if advance is not None:
            advance(path.stat().st_size, path.name)
    fresh = hash_files([path for path in paths if path not in found], advance)
    young = time.time_ns() - SETTLED_NS
    for path, sha256 in fresh.items():
        facts = path.stat()
        if facts.st_size >= SMALLEST and facts.st_mtime_ns < young and _mark(path) == before[path]:
            remembered.pop(before[path], None)
            remembered[before[path]] = sha256
    if fresh:
        _write(dict(list(remembered.items())[-MOST:]))
    return found | fresh, known


def _mark(path: Path) -> str:
    facts = path.stat()
    return f"{facts.st_dev}:{facts.st_ino}:{facts.st_size}:{facts.st_mtime_ns}"


def _read() -> dict[str, str]:
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
        return {str(mark): str(sha256) for mark, sha256 in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(remembered: dict[str, str]) -> None:
    try:
        write_json(cache_file(), remembered)
    except (OSError, StorageError):
        return
