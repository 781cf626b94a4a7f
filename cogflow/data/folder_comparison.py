"""Compare the folder of clips with what was prepared from it: captions by text, files by size, time and content."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from cogflow.config.data_section import DataConfig
from cogflow.data.buckets import at_bucket_size
from cogflow.data.clip_index import find_layout, iterate_index
from cogflow.data.data_changes import DataChanges, pair_by_name
from cogflow.data.encode import clip_key
from cogflow.data.quarantine import MISSING, FileStamp, LeftOutClip, file_stamp, read_quarantine, stamp_or_none
from cogflow.errors import DataError
from cogflow.files.hashing import hash_file
from cogflow.records.cache_records import CacheEntry, CacheIndex
from cogflow.runtime.progress import Advancing

COMPARE_SECONDS = 60.0
"""Time after which the comparison stops and reports what it has compared."""
_STRIDES = (
    16  # files are looked at in this many passes over the index, so that a stopped comparison saw all parts of it
)
_THREADS = 16  # file systems of clusters answer slowly, and many requests at once
_CHUNK = 1024  # files between two looks at the clock

OpenProgress = Callable[[int, str], AbstractContextManager[Advancing]]
"""(total, description) -> an open progress bar."""


@dataclass
class FolderComparison:
    """``changes``: differences between the folder and the prepared clips. ``summary``: a line on what was compared.

    ``is_complete``: False when time was up before the end of the list of clips.
    """

    changes: DataChanges = field(default_factory=DataChanges)
    summary: str = ""
    is_complete: bool = True


def compare_with_folder(
    index: CacheIndex, cache_folder: Path, data: DataConfig, report: OpenProgress, seconds: float = COMPARE_SECONDS
) -> FolderComparison:
    """Compare the clips and captions in ``data.path`` with the prepared ones, for at most about ``seconds``.

    The list of clips is read one row at a time. A file whose size and time of modification are those of the preparation
    counts as unchanged. A file of another time and the same size is hashed: a copied folder is not a change. A folder
    that is not on this machine is not compared.
    """
    folder = Path(data.path or "").expanduser()
    began = time.monotonic()
    deadline = began + seconds
    try:
        layout = find_layout(folder)
    except (DataError, OSError) as error:
        reason = error.message.splitlines()[0] if isinstance(error, DataError) else str(error)
        return FolderComparison(summary=f"data.path was not compared with the prepared clips: {reason}")
    found = FolderComparison()
    with report(len(index.entries), "comparing captions") as bar:
        matched = _compare_captions(index, cache_folder, folder, found, _Clock(deadline, bar))
    with report(len(matched), "comparing clips") as bar:
        files = _Files(folder, index, data, _Clock(deadline, bar))
        files.compare([index.entries[position] for position in _spread(matched)], found.changes)
    texts = f"the captions of {len(matched)} clips in {layout} by their text"
    texts += "" if found.is_complete else " (time was up before the end of the list)"
    spent = time.monotonic() - began
    found.summary = f"data.path was compared with the prepared clips in {spent:.1f} s: {texts}, {files.summary()}"
    return found


@dataclass(frozen=True)
class _Clock:
    """Advance a progress bar and know when time is up."""

    deadline: float
    bar: Advancing

    def is_over(self) -> bool:
        return time.monotonic() >= self.deadline


def _compare_captions(
    index: CacheIndex, cache_folder: Path, folder: Path, found: FolderComparison, clock: _Clock
) -> list[int]:
    """Add the differences between the list of clips and the index to ``found``; return the positions of the entries
    that are in both.
    """
    left_out = {one.name: one for one in read_quarantine(cache_folder)}
    listing = _Listing(folder, clock)
    matched: list[int] = []
    prepared = ((entry.name, position) for position, entry in enumerate(index.entries))
    changes = found.changes
    for name, position, text in pair_by_name(prepared, listing.rows()):
        if position is not None and text is not None:
            matched.append(position)
            if index.entries[position].text != text:
                changes.captions.add(name)
        elif listing.is_complete and position is not None:
            changes.removed.add(name)
        elif listing.is_complete and not _is_left_out(folder, name, left_out):
            changes.added.add(name)
    found.is_complete = listing.is_complete or bool(listing.problem)
    if listing.problem:
        changes.others.append(f"the list of clips cannot be read to its end: {listing.problem}")
    return matched


class _Listing:
    """The rows of the folder's list, up to the deadline. ``is_complete``: whether all rows were read."""

    def __init__(self, folder: Path, clock: _Clock) -> None:
        self._folder, self._clock = folder, clock
        self.is_complete = True
        self.problem = ""

    def rows(self) -> Iterator[tuple[str, str]]:
        try:
            for row in iterate_index(self._folder):
                if self._clock.is_over():
                    self.is_complete = False
                    return
                self._clock.bar.advance(1)
                yield row
        except (DataError, OSError) as error:
            self.is_complete = False
            self.problem = str(error).splitlines()[0]


def _is_left_out(folder: Path, name: str, left_out: dict[str, LeftOutClip]) -> bool:
    """Return whether a listed clip is one that could not be prepared and is as it was then, by its size."""
    if name not in left_out:
        return False
    stamp, former = stamp_or_none(folder / name), left_out[name]
    if stamp is None:
        return True
    return former.reason != MISSING if former.size is None else stamp[0] == former.size


def _spread(positions: Sequence[int]) -> list[int]:
    """Return ``positions`` in an order that covers all parts of the index in each of a few passes."""
    return list(chain.from_iterable(positions[start::_STRIDES] for start in range(_STRIDES)))


@dataclass
class _Files:
    """Compare video files, and count how. ``folder``: of the clips. ``is_here``: whether it has any of them."""

    folder: Path
    index: CacheIndex
    data: DataConfig
    clock: _Clock
    by_stamp: int = 0
    by_content: int = 0
    is_here: bool = True
    not_compared: int = 0

    def compare(self, entries: Sequence[CacheEntry], changes: DataChanges) -> None:
        """Add the entries whose files changed or are missing to ``changes``."""
        missing: list[CacheEntry] = []
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="compare") as pool:
            unsure = self._compare_stamps(entries, changes, missing, pool)
            for chunk in self._chunks(unsure, os.cpu_count() or 1):
                self.by_content += len(chunk)
                for entry, equal in zip(chunk, pool.map(self._is_prepared, chunk), strict=True):
                    if not equal:
                        changes.clips.add(entry.name)
                self.clock.bar.advance(0)
        self.is_here = bool(self.by_stamp or unsure or not missing)
        if self.is_here:
            for entry in missing:
                changes.missing.add(entry.name)

    def _compare_stamps(
        self, entries: Sequence[CacheEntry], changes: DataChanges, missing: list[CacheEntry], pool: ThreadPoolExecutor
    ) -> list[CacheEntry]:
        """Compare by size and time; return the entries that only their bytes can tell about."""
        unsure: list[CacheEntry] = []
        for chunk in self._chunks(entries, _CHUNK):
            for entry, stamp in zip(chunk, pool.map(self._stamp, chunk), strict=True):
                if stamp is None:
                    missing.append(entry)
                elif self._is_unsure(entry, stamp, changes):
                    unsure.append(entry)
            self.clock.bar.advance(len(chunk))
            if len(missing) == _CHUNK and not self.by_stamp and not unsure:
                break  # the list of clips is on this machine, and the clips are not
        return unsure

    def _is_unsure(self, entry: CacheEntry, stamp: FileStamp, changes: DataChanges) -> bool:
        """Return whether only the bytes of a file can tell if it changed; add a file of another size to ``changes``."""
        if entry.size is None or (stamp[0] == entry.size and stamp[1] != entry.modified_ns):
            return True
        self.by_stamp += 1
        if stamp[0] != entry.size:
            changes.clips.add(entry.name)
        return False

    def summary(self) -> str:
        """Return a clause on what was compared."""
        counts = [
            (self.by_stamp, "by size and time of modification"),
            (self.by_content, "by content (stage=prepare stores the new times)"),
        ]
        parts = [f"{count} file{'' if count == 1 else 's'} {how}" for count, how in counts if count]
        if not self.is_here:
            return "no file, because the clips are not on this machine"
        text = ", ".join(parts) or "no file"
        if self.not_compared:
            text += f"; time was up for {self.not_compared} files"
        return text

    def _chunks(self, entries: Sequence[CacheEntry], size: int) -> Iterator[Sequence[CacheEntry]]:
        """Yield ``entries`` in pieces until time is up; count the rest."""
        for start in range(0, len(entries), size):
            if self.clock.is_over():
                self.not_compared += len(entries) - start
                return
            yield entries[start : start + size]

    def _stamp(self, entry: CacheEntry) -> FileStamp | None:
        path = self.folder / entry.name
        try:
            # Pipes and devices, which hashing would read forever, are not clips.
            return file_stamp(path) if path.is_file() else None
        except OSError:
            return None

    def _is_prepared(self, entry: CacheEntry) -> bool:
        """Return whether the bytes of an entry's file are those that were prepared."""
        try:
            content = hash_file(self.folder / entry.name)
        except OSError:
            return False
        at_size = at_bucket_size(self.data, entry.bucket)
        return clip_key(content, at_size, self.index.models["vae"], self.index.settings.image_variants) == entry.clip
