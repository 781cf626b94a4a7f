"""Encode clips and captions once, keyed by content: reuse what is unchanged, encode what changed.

A clip's tensors have a key: the hash of the file's bytes, of the settings that shape its frames and of the VAE. A
caption's key hashes its text and the text encoder. A changed clip, caption, setting or encoder has another key, so
outdated tensors cannot be found. Shards are published as they fill, so a killed run continues where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av

from cogflow.config.config import Config
from cogflow.config.data_section import DataConfig
from cogflow.config.train_settings import PrepareStage
from cogflow.data import latent_cache
from cogflow.data.buckets import at_bucket_size
from cogflow.data.clip_index import read_index
from cogflow.data.clips import CLIP_SETTINGS
from cogflow.data.encode import (
    QUARANTINE,
    ClipWork,
    Embed,
    OpenProgress,
    Quarantine,
    ShardOutput,
    SourceClip,
    clip_key,
    digest,
    encode_captions,
    encode_clips,
    read_source_clip,
    require_readable_clip,
    text_key,
)
from cogflow.data.latent_cache import CLIPS, TEXTS, LatentCache, clips_per_bucket, scan_shards
from cogflow.data.softness import summarise_softness
from cogflow.errors import DataError
from cogflow.files.record_io import read_record, write_record
from cogflow.records.cache_records import (
    CacheCounts,
    CacheEntry,
    CacheIndex,
    CacheSettings,
    CaptionEntry,
    SoftnessRecord,
    StoredClip,
)
from cogflow.runtime import ranks
from cogflow.runtime.heartbeat import enter_phase

_ENOUGH_FPS = 0.99
"""Share of ``data.fps`` below which a clip counts as slower."""


@dataclass(frozen=True)
class PrepareResult:
    """Content of the cache in ``folder``, and the work and seconds of this preparation.

    ``upscaled`` and ``slower``: number of usable clips that are smaller than the wanted size, or have fewer frames per
    second than wanted; ``warnings`` has a sentence on each. ``buckets``: number of training clips by bucket, empty
    without buckets.
    """

    folder: Path
    clips: int
    train: int
    holdout: int
    encoded_clips: int
    encoded_captions: int
    unreadable: int
    upscaled: int
    slower: int
    fingerprint: str
    seconds: float
    warnings: list[str] = field(default_factory=list)
    softness: SoftnessRecord = field(default_factory=SoftnessRecord)
    buckets: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EncoderInputs:
    """Inputs besides the data on which the encoded tensors depend.

    ``hashes``: "vae" is part of clip keys, all others of caption keys. ``max_length``: tokens of a caption. ``images``:
    noised first frames to store of each clip, for image to video; 0: none.
    """

    hashes: Mapping[str, str]
    max_length: int
    images: int = 0

    @property
    def text_hashes(self) -> dict[str, str]:
        return {name: value for name, value in self.hashes.items() if name != "vae"}


@dataclass(frozen=True)
class _Plan:
    """Keys that this preparation needs. ``identity``: equal for equal data, settings and encoders."""

    items: list[SourceClip]
    clip_keys: list[str | None]
    text_keys: list[str]
    empty_key: str
    identity: str

    @property
    def texts(self) -> dict[str, str]:
        """Each distinct caption once, by key; the empty one first."""
        pairs = zip(self.text_keys, self.items, strict=True)
        return {self.empty_key: ""} | {key: item.entry.text for key, item in pairs}

    def by_clip_key(self) -> ClipWork:
        """Return one clip and all names of each distinct key."""
        first: dict[str, SourceClip] = {}
        names: dict[str, list[str]] = {}
        for key, item in zip(self.clip_keys, self.items, strict=True):
            if key is not None:
                first.setdefault(key, item)
                names.setdefault(key, []).append(item.entry.name)
        return ClipWork(first, names)


@dataclass(frozen=True)
class _Existing:
    """Keys that are already in the folder, and its index when nothing has changed."""

    clips: set[str]
    texts: set[str]
    index: CacheIndex | None


def prepare(
    config: Config[PrepareStage],
    load_vae: Callable[[], Any],
    load_text: Callable[[], Embed],
    folder: Path,
    clips_folder: Path,
    inputs: EncoderInputs,
    report: OpenProgress,
) -> PrepareResult:
    """Update the cache in ``folder`` (``<run>/cache``) to the clips in ``clips_folder``.

    Collective; the work is split over the ranks. ``load_vae`` and ``load_text`` are called on a rank only when it has
    something to encode: first the captions, then the clips, so both models are never loaded at once. Raises
    :class:`DataError` for an invalid index, too many unreadable clips, or no readable clip. While
    the folder does not match the data it has no index, so that training cannot use it.
    """
    started = time.monotonic()
    data, stage = config.data, config.stage
    plan = _make_plan(data, clips_folder, inputs)
    existing = ranks.run_on_main(lambda: _survey(folder, plan))
    if existing.index is not None:
        return _result(folder, existing.index, 0, 0, started)

    work = plan.by_clip_key()
    quarantine = Quarantine(data, len(plan.items), folder / QUARANTINE)
    _add_unreadable(quarantine, plan, require_one=not existing.clips & work.clips.keys())
    new_texts = [key for key in plan.texts if key not in existing.texts]
    new_clips = [key for key in work.clips if key not in existing.clips]
    my_texts = {key: plan.texts[key] for key in new_texts[ranks.rank() :: ranks.world_size()]}
    my_clips = {key: work.clips[key] for key in new_clips[ranks.rank() :: ranks.world_size()]}
    with ranks.tag_rank_errors():
        enter_phase("encoding captions")
        output = ShardOutput(stage.shard_clips, report)
        encode_captions(my_texts, load_text, folder, stage.batch_size, output)
        enter_phase("encoding clips")
        my_work = ClipWork(my_clips, work.names)
        encode_clips(my_work, load_vae, folder, quarantine, output=output, images=inputs.images)

    enter_phase("waiting until all have encoded")
    for rows in ranks.gather(quarantine.rows):
        for name, reason in rows.items():
            quarantine.add(name, reason)
    index = ranks.run_on_main(lambda: _finish(folder, plan, data, inputs, quarantine))
    unreadable_keys = {key for key in new_clips if work.names[key][0] in quarantine.rows}
    return _result(folder, index, len(new_clips) - len(unreadable_keys), len(new_texts), started)


def _make_plan(data: DataConfig, clips_folder: Path, inputs: EncoderInputs) -> _Plan:
    entries = read_index(clips_folder)
    mine = [read_source_clip(entry, data) for entry in entries[ranks.rank() :: ranks.world_size()]]
    by_rank = [iter(items) for items in ranks.gather(mine)]
    items = [next(by_rank[position % len(by_rank)]) for position in range(len(entries))]
    vae = inputs.hashes["vae"]
    clip_keys = [
        clip_key(item.content, at_bucket_size(data, item.bucket), vae, inputs.images) if item.content else None
        for item in items
    ]
    text_keys = [text_key(item.entry.text, inputs.text_hashes, inputs.max_length) for item in items]
    named = [[item.entry.name, clip, text] for item, clip, text in zip(items, clip_keys, text_keys, strict=True)]
    settings = {name: getattr(data, name) for name in (*CLIP_SETTINGS, "holdout", "max_bad_share")}
    # Without buckets and images a cache has the identity that it had before these settings existed.
    settings |= {"buckets": list(data.buckets)} if data.buckets else {}
    settings |= {"image_variants": inputs.images} if inputs.images else {}
    # Another version of PyAV may read what this one could not.
    identity = digest(CacheIndex.version, named, settings, dict(inputs.hashes), av.__version__)
    return _Plan(items, clip_keys, text_keys, text_key("", inputs.text_hashes, inputs.max_length), identity)


def _survey(folder: Path, plan: _Plan) -> _Existing:
    """Return the keys that are already in ``folder``; remove its index when anything has changed."""
    folder.mkdir(parents=True, exist_ok=True)
    latent_cache.remove_partial_shards(folder)
    clips, texts = set(scan_shards(folder, CLIPS)), set(scan_shards(folder, TEXTS))
    index_file = folder / CacheIndex.file_name
    try:
        index = read_record(index_file, CacheIndex)
        if index.plan == plan.identity:
            LatentCache(folder)
            return _Existing(clips, texts, index)
    except DataError:
        pass
    index_file.unlink(missing_ok=True)
    return _Existing(clips, texts, None)


def _add_unreadable(quarantine: Quarantine, plan: _Plan, *, require_one: bool) -> None:
    """Add the clips without a hash to ``quarantine``. ``require_one``: check that at least one clip can be read."""
    for item in plan.items:
        if item.reason is not None:
            quarantine.rows[item.entry.name] = item.reason
    if require_one:
        require_readable_clip(plan.items, quarantine)
    for name, reason in list(quarantine.rows.items()):
        quarantine.add(name, reason)


def _finish(folder: Path, plan: _Plan, data: DataConfig, inputs: EncoderInputs, quarantine: Quarantine) -> CacheIndex:
    """Write the index over all shards, and remove the shards that it does not name."""
    stored_clips, stored_texts = scan_shards(folder, CLIPS), scan_shards(folder, TEXTS)
    entries: list[CacheEntry] = []
    clips: dict[str, StoredClip] = {}
    sources: list[str] = []
    for item, clip, text in zip(plan.items, plan.clip_keys, plan.text_keys, strict=True):
        stored = stored_clips.get(clip) if clip is not None else None
        if clip is None or stored is None or stored.clip is None or item.entry.name in quarantine.rows:
            continue
        clips[item.entry.name] = stored.clip
        sources.append(item.content or "")
        entries.append(
            CacheEntry(
                key=digest(clip, text),
                name=item.entry.name,
                text=item.entry.text,
                clip=clip,
                clip_shard=stored.shard,
                caption=text,
                text_shard=stored_texts[text].shard,
                bucket=item.bucket,
            )
        )
    quarantine.write()
    if not entries:
        raise quarantine.stop("no clip can be read")
    train, holdout = latent_cache.split_holdout(sources, data.holdout)
    keys = [entry.key for entry in entries]
    index = CacheIndex(
        plan=plan.identity,
        fingerprint=latent_cache.cache_fingerprint(keys, [keys[position] for position in holdout]),
        settings=CacheSettings(
            **{name: getattr(data, name) for name in CLIP_SETTINGS},
            max_length=inputs.max_length,
            buckets=list(data.buckets),
            image_variants=inputs.images,
        ),
        models=dict(inputs.hashes),
        counts=CacheCounts(
            unreadable=len(quarantine.rows),
            upscaled=sum(clips[entry.name].upscaled for entry in entries),
            slower=sum(clips[entry.name].fps < _ENOUGH_FPS * data.fps for entry in entries),
        ),
        empty=CaptionEntry(plan.empty_key, stored_texts[plan.empty_key].shard),
        train=train,
        holdout=holdout,
        entries=entries,
        softness=summarise_softness(clips, {entry.name: entry.bucket for entry in entries if entry.bucket}, data),
    )
    write_record(folder / CacheIndex.file_name, index)
    used = {shard for entry in entries for shard in (entry.clip_shard, entry.text_shard)} | {index.empty.text_shard}
    latent_cache.remove_unused_shards(folder, used)
    return index


def _result(
    folder: Path, index: CacheIndex, encoded_clips: int, encoded_captions: int, started: float
) -> PrepareResult:
    return PrepareResult(
        folder=folder,
        clips=len(index.entries),
        train=len(index.train),
        holdout=len(index.holdout),
        encoded_clips=encoded_clips,
        encoded_captions=encoded_captions,
        unreadable=index.counts.unreadable,
        upscaled=index.counts.upscaled,
        slower=index.counts.slower,
        fingerprint=index.fingerprint,
        seconds=time.monotonic() - started,
        warnings=_warnings(folder, index),
        softness=index.softness,
        buckets=clips_per_bucket(index),
    )


def _warnings(folder: Path, index: CacheIndex) -> list[str]:
    counts, settings, total = index.counts, index.settings, len(index.entries)
    warnings = []
    if counts.unreadable:
        warnings.append(
            f"{counts.unreadable} clips are unreadable and left out; the reasons are in {folder / QUARANTINE}"
        )
    if counts.upscaled:
        size = "their bucket" if settings.buckets else f"{settings.width}x{settings.height}"
        sizes = ", ".join(f"{count} of {own}" for own, count in list(index.softness.upscaled.items())[:4])
        own = f" ({sizes})" if sizes else ""
        warnings.append(
            f"{counts.upscaled} of {total} clips are smaller than {size} and were upscaled{own}: they are soft, "
            "and a model learns that. Leave them out or lower data.height and data.width"
        )
    if counts.slower:
        warnings.append(
            f"{counts.slower} of {total} clips have fewer than data.fps={settings.fps:g} frames a second: "
            "frames are repeated"
        )
    return warnings
