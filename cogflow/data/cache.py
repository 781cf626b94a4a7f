"""Prepared clips as training reads them: VAE moments and caption embeddings, looked up lazily."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from cogflow.config.data_section import DataConfig
from cogflow.data import first_frame
from cogflow.data.buckets import in_order
from cogflow.data.cache_shards import ShardReader
from cogflow.data.clips import SETTINGS
from cogflow.errors import DataError
from cogflow.files.record_io import read_record
from cogflow.records.cache_records import CacheIndex, CacheSettings

SIZE = ("frames", "height", "width")

Pair = TypeVar("Pair", bound=tuple[int, ...])


@dataclass(frozen=True)
class CachedClip:
    """``mean`` and ``logvar`` are fp32 ``[16, t, h, w]``, unscaled; ``embeds`` is ``[L, D]`` in the text encoder's dtype."""

    key: str
    name: str
    text: str
    mean: torch.Tensor
    logvar: torch.Tensor
    embeds: torch.Tensor


class LatentCache:
    """The clips of one prepared folder, in the order of the data's index without the unreadable ones.

    ``train`` and ``holdout`` are positions for :meth:`entry`; no clip's content is in both. ``empty_embeds`` ``[L, D]``
    embeds the empty caption. ``fingerprint`` names the content: equal fingerprints mean equal tensors in equal order.
    Raises :class:`DataError` when the folder is not (or not completely) prepared.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / CacheIndex.file_name).is_file():
            raise DataError(f"no prepared clips in {folder}", "run stage=prepare first, with the same settings")
        self._index = read_record(folder / CacheIndex.file_name, CacheIndex)
        self._entries = self._index.entries
        self.train = self._index.train
        self.holdout = self._index.holdout
        self.fingerprint = self._index.fingerprint
        shards = {shard for entry in self._entries for shard in (entry.clip_shard, entry.text_shard)}
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise DataError(
                f"{len(missing)} files of {folder} are gone, first {missing[0]}",
                "run stage=prepare again, it makes what is missing",
            )
        self.folder = folder
        self._groups: list[list[int]] | None = None
        self._reader = ShardReader(folder)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def settings(self) -> CacheSettings:
        """The settings that the clips were prepared with."""
        return self._index.settings

    @property
    def model_hashes(self) -> dict[str, str]:
        """What encoded these clips, as given to ``prepare``."""
        return self._index.models

    @property
    def texts(self) -> list[str]:
        """The caption of each entry, without reading a tensor."""
        return [entry.text for entry in self._entries]

    def mismatches(self, data: DataConfig) -> list[str]:
        """Settings of ``data`` that differ from those the clips were prepared with, one line each."""
        # With buckets the one size is that of the samples, and shapes no clip.
        then = {name: getattr(self.settings, name) for name in SETTINGS if name not in SIZE or not data.buckets}
        then["buckets"] = self.settings.buckets
        if self.image_variants:
            then["image_variants"] = self.image_variants
        return [
            f"data.{k}={getattr(data, k)}, prepared with {value}"
            for k, value in then.items()
            if getattr(data, k) != value
        ]

    @property
    def image_variants(self) -> int:
        """Noised first frames that are stored of each clip, for image to video; 0 for text to video."""
        return self.settings.image_variants

    def image(self, position: int, variant: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of a noised first frame of the clip at ``position``: fp32 ``[16, 1, h, w]``, not scaled."""
        mean, logvar = (self._clip_tensor(position, name) for name in first_frame.names(variant))
        return mean, logvar

    def first_frame(self, position: int) -> torch.Tensor:
        """The first frame of the clip at ``position`` as the loader gives it, without noise: uint8 ``[H, W, 3]``."""
        return self._clip_tensor(position, first_frame.FRAME)

    def _clip_tensor(self, position: int, name: str) -> torch.Tensor:
        entry = self._entries[position]
        return self._reader.read(entry.clip_shard, f"{entry.clip}.{name}")

    def bucket(self, position: int) -> str | None:
        """The bucket of the clip at ``position``; ``None`` when all clips have one size."""
        return self._entries[position].bucket

    @property
    def groups(self) -> list[list[int]]:
        """``train`` by bucket, longest sequences first; empty when all clips have one size."""
        if self._groups is None:
            alike = self.alike([(position,) for position in self.train]) if self.settings.buckets else []
            self._groups = [[position for (position,) in one] for one in alike]
        return self._groups

    def alike(self, pairs: Sequence[Pair]) -> list[list[Pair]]:
        """``pairs``, which begin with a position, in lists of one size each, in their order."""
        if not self.settings.buckets:
            return [list(pairs)]
        held = in_order([str(self.bucket(pair[0])) for pair in pairs])
        return [[pair for pair in pairs if self.bucket(pair[0]) == bucket] for bucket in held]

    def entry(self, position: int) -> CachedClip:
        """The clip at ``position`` (0 to len - 1), its tensors mapped from the file on the CPU."""
        entry = self._entries[position]
        return CachedClip(
            key=entry.key,
            name=entry.name,
            text=entry.text,
            mean=self._reader.read(entry.clip_shard, f"{entry.clip}.mean"),
            logvar=self._reader.read(entry.clip_shard, f"{entry.clip}.logvar"),
            embeds=self._reader.read(entry.text_shard, f"{entry.caption}.embeds"),
        )

    def clip_of(self, position: int) -> str:
        """The key of the clip at ``position``: of its file's content, the settings that shape it, and the VAE (``encode.clip_key``)."""
        return self._entries[position].clip

    def name_of(self, position: int) -> str:
        """What the data's index calls the clip at ``position``."""
        return self._entries[position].name

    @property
    def empty_embeds(self) -> torch.Tensor:
        empty = self._index.empty
        return self._reader.read(empty.text_shard, f"{empty.caption}.embeds")


def split(sources: Sequence[str], holdout: int) -> tuple[list[int], list[int]]:
    """Positions to train on and to hold out, given each clip's content hash.

    The clips with the smallest hashes are held out, so that the choice does not depend on names, order or what else was
    added. Equal content stays on one side, and at least half remains for training.
    """
    limit = min(holdout, len(sources) // 2)
    groups: dict[str, list[int]] = {}
    for position, source in enumerate(sources):
        groups.setdefault(source, []).append(position)
    held: list[int] = []
    for source in sorted(groups):
        if len(held) + len(groups[source]) <= limit:
            held += groups[source]
    return sorted(set(range(len(sources))) - set(held)), sorted(held)


def count_by_bucket(index: CacheIndex) -> dict[str, int]:
    """Return the number of clips to train on in each bucket, unused buckets included."""
    counts = Counter(index.entries[position].bucket for position in index.train)
    return {bucket: counts[bucket] for bucket in index.settings.buckets}


def fingerprint(keys: Sequence[str], holdout: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([list(keys), list(holdout)]).encode()).hexdigest()
