"""Files that were just written are read again from the disk, in a thread, while others are still being written."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cogflow.errors import StorageError
from cogflow.files.manifest import hash_uncached


class ReadBack:
    """Holds each file against what was hashed on its way to the disk; a context, so that no thread outlives the block.

    The files must have been flushed and let go (:class:`cogflow.files.uncached_io.UncachedWriter`).
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read back")
        self._files: list[tuple[Path, str, Future[str]]] = []

    def __enter__(self) -> ReadBack:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, path: Path, sha256: str) -> None:
        """Begin to read ``path``; returns at once."""
        self._files.append((path, sha256, self._pool.submit(hash_uncached, path)))

    def waiting(self) -> int:
        """Bytes of the files that are not read yet."""
        return sum(path.stat().st_size for path, _, future in self._files if not future.done())

    def finish(self, done: Callable[[int, str], None]) -> None:
        """Wait for all; ``done(bytes, name)`` is called for each that had to be waited for. Raises :class:`StorageError` that names those
        that came back changed, :class:`OSError` for one that cannot be read."""
        changed = []
        for path, sha256, future in self._files:
            waited = not future.done()
            if future.result() != sha256:
                changed.append(path.name)
            if waited:
                done(path.stat().st_size, path.name)
        if changed:
            raise StorageError(
                f"{', '.join(changed)} came back from the disk changed.", "The disk or its memory is failing."
            )
