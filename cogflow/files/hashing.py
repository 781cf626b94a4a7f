"""sha256 of many large files at once: a thread each, a few MiB of memory each."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE = 1 << 22
"""Bytes read at a time: hashlib lets go of the interpreter for as long as it takes to hash them."""
MOST = 8
"""Threads; more than that outrun no disk that one folder lies on."""

Advance = Callable[[int, str], None]
"""Told of (bytes, name of their file) as they are done; never by two threads at once."""


def hash_files(paths: Iterable[Path], advance: Advance | None = None) -> dict[Path, str]:
    """sha256 in hex by path. The largest are begun first, so that no thread is left with one at the end.

    Raises :class:`OSError` for a file that cannot be read.
    """
    sizes = {path: path.stat().st_size for path in paths}
    lock, stop = threading.Lock(), threading.Event()

    def work(path: Path) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(min(PIECE, max(1, sizes[path]))))
        with open(path, "rb", buffering=0) as file:
            while (count := file.readinto(buffer)) and not stop.is_set():
                digest.update(buffer[:count])
                if advance is not None:
                    with lock:
                        advance(count, path.name)
        return digest.hexdigest()

    with ThreadPoolExecutor(min(MOST, os.cpu_count() or 1), thread_name_prefix="hash") as pool:
        futures = {path: pool.submit(work, path) for path in sorted(sizes, key=lambda path: -sizes[path])}
        try:
            return {path: future.result() for path, future in futures.items()}
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
