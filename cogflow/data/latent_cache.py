"""The cache of prepared clips: VAE moments and caption embeddings in safetensors files, and an index over them.

Tensors are stored by content-derived keys in shards. A shard is complete or absent and never changes. Clips are read
when they are used, from memory-mapped files.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from cogflow.config.command import same_settings
from cogflow.config.data_section import DataConfig
from cogflow.data.buckets import longest_first
from cogflow.data.clips import CLIP_SETTINGS
from cogflow.data.former_index import index_shards, read_former
from cogflow.errors import DataError
from cogflow.files.atomic_write import require_space, storage_errors, sync
from cogflow.files.bounded_parsing import parse_json
from cogflow.files.contained_files import is_file_below
from cogflow.files.record_io import parse_record, read_record, record_values
from cogflow.records.cache_records import CacheIndex, CacheSettings, StoredClip
from cogflow.runtime.console import echo
from cogflow.weights.safetensors_file import save_tensors

CLIPS, TEXTS = "clips", "texts"
"""Kinds of shards.

Clips: ``<key>.mean``, ``<key>.logvar``, and for image to video first frames. Texts: ``<key>.embeds``.
"""

FIRST_FRAME = "first"
"""Name of a clip's first frame, uint8 ``[H, W, 3]``, from which image-to-video validations sample."""

SIZE = ("frames", "height", "width")

Positions = TypeVar("Positions", bound=tuple[int, ...])

_FACTS = "facts"
_PARTIAL = ".partial"


def first_frame_names(variant: int) -> tuple[str, str]:
    """Return the names of mean and log variance of a noised first frame."""
    return f"image_mean_{variant}", f"image_logvar_{variant}"


@dataclass(frozen=True)
class CachedClip:
    """One clip as training reads it.

    ``mean`` and ``logvar`` are fp32 ``[16, t, h, w]``, not scaled. ``embeds`` is ``[L, D]`` in the text encoder's
    dtype.
    """

    key: str
    name: str
    text: str
    mean: torch.Tensor
    logvar: torch.Tensor
    embeds: torch.Tensor


class LatentCache:
    """The clips of one prepared folder, in the order of the data's index, without the unreadable ones.

    ``train`` and ``holdout`` are positions for :meth:`entry`; no clip's content is in both. ``fingerprint`` identifies
    the content: equal fingerprints mean equal tensors in equal order. Raises :class:`DataError` when the folder is not
    completely prepared.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / CacheIndex.file_name).exists():
            raise DataError(
                f"no prepared clips in {folder}",
                f"prepare them first, with the same settings: {same_settings('prepare')}",
            )
        self.folder = folder
        self._reader = ShardReader(folder)
        self._use(read_record(folder / CacheIndex.file_name, CacheIndex))

    def _use(self, index: CacheIndex) -> None:
        missing = sorted(name for name in index_shards(index) if not is_file_below(self.folder, name))
        if missing:
            raise DataError(
                f"{len(missing)} files of {self.folder} are missing, the first is {missing[0]}",
                "run stage=prepare again, it writes the missing files",
            )
        self._index = index
        self._entries = index.entries
        self.train = index.train
        self.holdout = index.holdout
        self.fingerprint = index.fingerprint
        self._groups: list[list[int]] | None = None

    def use_former(self, fingerprint: str) -> bool:
        """Switch to the clips with ``fingerprint``, which ``stage=prepare`` has replaced; return whether they are kept.

        Raises :class:`DataError` when one of their files is missing.
        """
        former = read_former(self.folder, fingerprint)
        if former is not None:
            self._use(former)
        return former is not None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def index(self) -> CacheIndex:
        """The index of the clips in use."""
        return self._index

    @property
    def settings(self) -> CacheSettings:
        """Settings that the clips were prepared with."""
        return self._index.settings

    @property
    def model_hashes(self) -> dict[str, str]:
        """Hashes of the models that encoded these clips, as given to ``prepare``."""
        return self._index.models

    @property
    def texts(self) -> list[str]:
        """The caption of each entry."""
        return [entry.text for entry in self._entries]

    def mismatches(self, data: DataConfig) -> list[str]:
        """Return one line for each setting of ``data`` that differs from the settings of the cache."""
        # With buckets, data.frames, data.height and data.width are the size of samples; clips do not depend on it.
        names = [name for name in CLIP_SETTINGS if name not in SIZE or not data.buckets] + ["buckets"]
        if self.image_variants:
            names.append("image_variants")
        pairs = [(name, getattr(data, name), getattr(self.settings, name)) for name in names]
        return [f"data.{name}={now}, prepared with {then}" for name, now, then in pairs if now != then]

    @property
    def image_variants(self) -> int:
        """Number of noised first frames stored with each clip, for image to video; 0 for text to video."""
        return self.settings.image_variants

    def entry(self, position: int) -> CachedClip:
        """Return the clip at ``position`` (0 to len - 1) with tensors on the CPU, mapped from the file."""
        entry = self._entries[position]
        return CachedClip(
            key=entry.key,
            name=entry.name,
            text=entry.text,
            mean=self._clip_tensor(position, "mean"),
            logvar=self._clip_tensor(position, "logvar"),
            embeds=self._reader.read(entry.text_shard, f"{entry.caption}.embeds"),
        )

    @property
    def empty_embeds(self) -> torch.Tensor:
        """The embedding of the empty caption, ``[L, D]``."""
        empty = self._index.empty
        return self._reader.read(empty.text_shard, f"{empty.caption}.embeds")

    def image(self, position: int, variant: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log variance of a noised first frame of a clip: fp32 ``[16, 1, h, w]``, not scaled."""
        mean, logvar = (self._clip_tensor(position, name) for name in first_frame_names(variant))
        return mean, logvar

    def first_frame(self, position: int) -> torch.Tensor:
        """Return the first frame of the clip at ``position`` without noise: uint8 ``[H, W, 3]``."""
        return self._clip_tensor(position, FIRST_FRAME)

    def _clip_tensor(self, position: int, name: str) -> torch.Tensor:
        entry = self._entries[position]
        return self._reader.read(entry.clip_shard, f"{entry.clip}.{name}")

    def clip_of(self, position: int) -> str:
        """Return the key of the clip at ``position``, a hash of its file, its settings and the VAE."""
        return self._entries[position].clip

    def name_of(self, position: int) -> str:
        """Return the name of the clip at ``position`` in the data's index."""
        return self._entries[position].name

    def bucket(self, position: int) -> str | None:
        """Return the bucket of the clip at ``position``; ``None`` when all clips have one size."""
        return self._entries[position].bucket

    @property
    def groups(self) -> list[list[int]]:
        """``train`` by bucket, longest sequences first; empty when all clips have one size."""
        if self._groups is None:
            positions = [(position,) for position in self.train]
            alike = self.group_by_size(positions) if self.settings.buckets else []
            self._groups = [[position for (position,) in group] for group in alike]
        return self._groups

    def group_by_size(self, items: Sequence[Positions]) -> list[list[Positions]]:
        """Return ``items``, tuples that begin with a position, in lists of one size each, longest sequences first."""
        if not self.settings.buckets:
            return [list(items)]
        held = longest_first([str(self.bucket(item[0])) for item in items])
        return [[item for item in items if self.bucket(item[0]) == bucket] for bucket in held]


def clips_per_bucket(index: CacheIndex) -> dict[str, int]:
    """Return the number of training clips by bucket: 0 for unused buckets, and empty without buckets."""
    counts = Counter(index.entries[position].bucket for position in index.train)
    return {bucket: counts[bucket] for bucket in index.settings.buckets}


def cache_fingerprint(keys: Sequence[str], holdout: Sequence[str]) -> str:
    """Return the hash over the keys of all entries and of the held-out ones."""
    return hashlib.sha256(json.dumps([list(keys), list(holdout)]).encode()).hexdigest()


@dataclass(frozen=True)
class StoredTensors:
    """The shard (file name) with the tensors of one key, and the record of the clip; None for captions."""

    shard: str
    clip: StoredClip | None = None


class ShardWriter:
    """Collect tensors by key, and publish a shard when it has ``items`` keys, ``bytes_`` bytes or is ``seconds`` old.

    A killed process loses at most that much work. As a context manager it publishes the rest at the end, also after an
    error, because the tensors added before are valid. Raises :class:`~cogflow.errors.StorageError` when a file cannot
    be written.
    """

    def __init__(self, folder: Path, kind: str, items: int, bytes_: int = 512 * 2**20, seconds: float = 120.0) -> None:
        self._folder, self._kind = folder, kind
        self._items, self._bytes, self._seconds = items, bytes_, seconds
        self._tensors: dict[str, torch.Tensor] = {}
        self._clips: dict[str, StoredClip | None] = {}
        self._since = time.monotonic()

    def add(self, key: str, tensors: dict[str, torch.Tensor], clip: StoredClip | None = None) -> None:
        """Add ``tensors`` by name under ``key``, with the record of the clip; None for captions."""
        if not self._clips:
            self._since = time.monotonic()
        for part, tensor in tensors.items():
            self._tensors[f"{key}.{part}"] = tensor.detach().cpu().contiguous()
        self._clips[key] = clip
        size = sum(tensor.nbytes for tensor in self._tensors.values())
        if len(self._clips) >= self._items or size >= self._bytes or time.monotonic() - self._since >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Publish the tensors that were added since the last shard."""
        if not self._clips:
            return
        keys = "".join(sorted(self._clips))
        name = f"{self._kind}-{hashlib.sha256(keys.encode()).hexdigest()[:20]}.safetensors"
        target = self._folder / name
        partial = self._folder / f".{name}{_PARTIAL}-{os.getpid()}"
        facts = {key: record_values(clip) if clip else {} for key, clip in self._clips.items()}
        try:
            require_space(target, sum(tensor.nbytes for tensor in self._tensors.values()))
            with storage_errors(target):
                save_tensors(self._tensors, partial, metadata={_FACTS: json.dumps(facts)})
                sync(partial)
                partial.replace(target)
                sync(self._folder)
        finally:
            partial.unlink(missing_ok=True)
            self._tensors.clear()
            self._clips.clear()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()


class ShardReader:
    """Read tensors by shard and name, mapped from the file.

    At most ``open_files`` shards stay mapped. Threads may share one reader.
    """

    def __init__(self, folder: Path, open_files: int = 64) -> None:
        self._folder, self._limit = folder, open_files
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: str, name: str) -> torch.Tensor:
        """Return the tensor ``name`` of the file ``shard``."""
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
            else:
                self._open[shard] = safe_open(self._folder / shard, framework="pt")
                if len(self._open) > self._limit:
                    self._open.popitem(last=False)
            tensor: torch.Tensor = self._open[shard].get_tensor(name)
            return tensor


def scan_shards(folder: Path, kind: str) -> dict[str, StoredTensors]:
    """Return the location of all keys in the published shards of ``kind``.

    Damaged shards are removed, so that their clips or captions are encoded again.
    """
    found: dict[str, StoredTensors] = {}
    for path in sorted(folder.glob(f"{kind}-*.safetensors")):
        try:
            with safe_open(path, framework="pt") as shard:
                facts = parse_json((shard.metadata() or {})[_FACTS])
                held = {name.rsplit(".", 1)[0] for name in shard.keys()}  # noqa: SIM118
                clips = {key: _stored_clip(values, path) for key, values in facts.items() if key in held}
        except (SafetensorError, OSError, ValueError, KeyError, DataError):
            echo(f"note: {path} is damaged and is removed; what it holds is encoded again")
            path.unlink(missing_ok=True)
            continue
        found.update({key: StoredTensors(path.name, clip) for key, clip in clips.items()})
    return found


def _stored_clip(values: dict[str, Any], path: Path) -> StoredClip | None:
    return parse_record(json.dumps(values), StoredClip, str(path)) if values else None


def remove_partial_shards(folder: Path) -> None:
    """Remove incomplete files of killed processes.

    Must not run while another process prepares into ``folder``.
    """
    for path in folder.glob(f".*{_PARTIAL}-*"):
        path.unlink(missing_ok=True)


def remove_unused_shards(folder: Path, used: set[str]) -> int:
    """Remove the shards whose file names are not in ``used``; return their number."""
    unused = [path for path in folder.glob("*.safetensors") if path.name not in used]
    for path in unused:
        path.unlink(missing_ok=True)
    return len(unused)
