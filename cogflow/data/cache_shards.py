"""Content-keyed tensors in safetensors files: each file is complete or absent, is never changed, and is read lazily."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cogflow.errors import DataError
from cogflow.files.atomic_write import require_space, storage_errors, sync
from cogflow.files.record_io import parse_record, record_values
from cogflow.records.cache_records import StoredClip

_FACTS = "facts"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Stored:
    """The file that holds the tensors of one key, and what is stored of the clip (None for captions)."""

    shard: str
    clip: StoredClip | None = None


class ShardWriter:
    """Collects tensors by key and publishes a shard when ``items``, ``bytes_`` or ``seconds`` have come together.

    So a killed process loses at most that much work. As a context manager it publishes the rest at the end, also when
    an error ends the block: what is finished is right, whatever came after. Raises
    :class:`~cogflow.errors.StorageError` when a file cannot be written.
    """

    def __init__(self, folder: Path, kind: str, items: int, bytes_: int = 512 * 2**20, seconds: float = 120.0) -> None:
        self._folder, self._kind = folder, kind
        self._items, self._bytes, self._seconds = items, bytes_, seconds
        self._tensors: dict[str, torch.Tensor] = {}
        self._clips: dict[str, StoredClip | None] = {}
        self._since = time.monotonic()

    def add(self, key: str, tensors: dict[str, torch.Tensor], clip: StoredClip | None = None) -> None:
        if not self._clips:
            self._since = time.monotonic()
        for part, tensor in tensors.items():
            self._tensors[f"{key}.{part}"] = tensor.detach().cpu().contiguous()
        self._clips[key] = clip
        size = sum(t.nbytes for t in self._tensors.values())
        if len(self._clips) >= self._items or size >= self._bytes or time.monotonic() - self._since >= self._seconds:
            self.flush()

    def flush(self) -> None:
        if not self._clips:
            return
        keys = "".join(sorted(self._clips))
        name = f"{self._kind}-{hashlib.sha256(keys.encode()).hexdigest()[:20]}.safetensors"
        target = self._folder / name
        beside = self._folder / f".{name}{_PARTIAL}-{os.getpid()}"
        try:
            facts = {key: record_values(clip) if clip else {} for key, clip in self._clips.items()}
            require_space(target, sum(tensor.nbytes for tensor in self._tensors.values()))
            with storage_errors(target):
                save_file(self._tensors, beside, metadata={_FACTS: json.dumps(facts)})
                sync(beside)
                beside.replace(target)
                sync(self._folder)
        finally:
            beside.unlink(missing_ok=True)
            self._tensors.clear()
            self._clips.clear()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()


def scan(folder: Path, kind: str) -> dict[str, Stored]:
    """Return what the published shards of ``kind`` hold, by key. A damaged file is removed, to be made again."""
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob(f"{kind}-*.safetensors")):
        try:
            with safe_open(path, framework="pt") as shard:
                facts = json.loads((shard.metadata() or {})[_FACTS])
                held = {name.rsplit(".", 1)[0] for name in shard.keys()}  # noqa: SIM118
                clips = {key: _stored_clip(note, path) for key, note in facts.items() if key in held}
        except (SafetensorError, OSError, ValueError, KeyError, DataError):
            path.unlink(missing_ok=True)
            continue
        found.update({key: Stored(path.name, clip) for key, clip in clips.items()})
    return found


def _stored_clip(note: dict[str, Any], path: Path) -> StoredClip | None:
    return parse_record(json.dumps(note), StoredClip, str(path)) if note else None


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written. Not while another process prepares into the same folder."""
    for path in folder.glob(f".*{_PARTIAL}-*"):
        path.unlink(missing_ok=True)


def prune(folder: Path, used: set[str]) -> int:
    """Remove the shards that are not ``used`` (file names); returns how many."""
    unused = [path for path in folder.glob("*.safetensors") if path.name not in used]
    for path in unused:
        path.unlink(missing_ok=True)
    return len(unused)


class ShardReader:
    """Reads tensors by shard and name, mapped from the file, of which at most ``open_files`` are open. Thread-safe."""

    def __init__(self, folder: Path, open_files: int = 64) -> None:
        self._folder, self._limit = folder, open_files
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: str, name: str) -> torch.Tensor:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
            else:
                self._open[shard] = safe_open(self._folder / shard, framework="pt")
                if len(self._open) > self._limit:
                    self._open.popitem(last=False)
            return self._open[shard].get_tensor(name)
