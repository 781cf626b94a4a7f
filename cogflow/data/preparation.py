"""Encode clips and captions once, keyed by content: what is unchanged is reused, what changed is encoded again.

A clip's tensors are named after the hash of its bytes, of the settings that shape its frames and of the VAE; a caption's
after its text and the text encoder. A changed clip, caption, setting or encoder is therefore another name, and a stale
tensor cannot be found. Shards are published as they fill, so a killed run goes on where it stopped.
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
from cogflow.data import buckets, cache, cache_shards, softness
from cogflow.data.clip_index import read_index
from cogflow.data.clips import SETTINGS
from cogflow.data.encode import (
    CLIPS,
    QUARANTINE,
    TEXTS,
    Embed,
    Item,
    Quarantine,
    Report,
    clip_key,
    digest,
    encode_captions,
    encode_clips,
    probe,
    read_item,
    text_key,
)
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


@dataclass(frozen=True)
class PrepareResult:
    """What is now in ``folder`` and what it took. ``upscaled`` and ``slower`` count usable clips that are smaller than
    the wanted size or have fewer frames per second; ``warnings`` says so in words."""

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
    buckets: dict[str, int] = field(default_factory=dict)  # clips to train on by bucket; empty without buckets


@dataclass(frozen=True)
class _Plan:
    """The keys this preparation needs, and ``identity``: equal identities mean that nothing at all has changed."""

    items: list[Item]
    clip_keys: list[str | None]
    text_keys: list[str]
    empty_key: str
    identity: str

    @property
    def texts(self) -> dict[str, str]:
        """Each distinct caption once, by key; the empty one first."""
        return {self.empty_key: ""} | {
            key: item.entry.text for key, item in zip(self.text_keys, self.items, strict=True)
        }

    def by_clip_key(self) -> tuple[dict[str, Item], dict[str, list[str]]]:
        """One item and all names of each distinct clip."""
        first: dict[str, Item] = {}
        names: dict[str, list[str]] = {}
        for key, item in zip(self.clip_keys, self.items, strict=True):
            if key is not None:
                first.setdefault(key, item)
                names.setdefault(key, []).append(item.entry.name)
        return first, names


def prepare(
    config: Config[PrepareStage],
    load_vae: Callable[[], Any],
    load_text: Callable[[], Embed],
    folder: Path,
    clips_folder: Path,
    model_hashes: Mapping[str, str],
    max_length: int,
    report: Report,
    images: int = 0,
) -> PrepareResult:
    """Bring ``folder`` (``<run>/cache``) in line with the clips in ``clips_folder``; ``config.stage`` is the prepare stage.

    ``load_vae`` and ``load_text`` are called on a rank only when it has something to encode, first the captions, then
    the clips, never both models at once. ``model_hashes`` has "vae", which names clips, and whatever else determines
    the embeddings. ``images``: noised first frames to store of each clip, for image to video; 0: none. Called by every rank of a
    process group; the work is split over them.

    Raises :class:`DataError` for an index that cannot work, too many unreadable clips, or none that is readable. While
    the folder does not match the data it has no index, so that training cannot take what it holds.
    """
    started = time.monotonic()
    data, options = config.data, config.stage
    plan = _make_plan(data, clips_folder, model_hashes, max_length, images)
    known_clips, known_texts, current = ranks.run_on_main(lambda: _survey(folder, plan))
    if current is not None:
        return _result(folder, current, 0, 0, started)

    quarantine = Quarantine(data, len(plan.items), folder / QUARANTINE)
    first, names = plan.by_clip_key()
    for item in plan.items:
        if item.reason is not None:
            quarantine.rows[item.entry.name] = item.reason
    if not known_clips & first.keys():
        probe(plan.items, data, quarantine)
    for name, reason in list(quarantine.rows.items()):
        quarantine.add(name, reason)

    texts = plan.texts
    new_texts = [key for key in texts if key not in known_texts]
    new_clips = [key for key in first if key not in known_clips]
    my_texts = {key: texts[key] for key in new_texts[ranks.rank() :: ranks.world_size()]}
    my_clips = {key: first[key] for key in new_clips[ranks.rank() :: ranks.world_size()]}
    with ranks.tag_rank_errors():
        enter_phase("encoding captions")
        encode_captions(my_texts, load_text, folder, batch=options.batch_size, shard=options.shard_clips, report=report)
        enter_phase("encoding clips")
        encode_clips(
            my_clips, names, load_vae, folder, data, quarantine, images=images, shard=options.shard_clips, report=report
        )

    enter_phase("waiting until all have encoded")
    for rows in ranks.gather(quarantine.rows):
        for name, reason in rows.items():
            quarantine.add(name, reason)
    index = ranks.run_on_main(lambda: _finish(folder, plan, data, model_hashes, max_length, quarantine, images))
    unreadable_keys = {key for key in new_clips if names[key][0] in quarantine.rows}
    return _result(folder, index, len(new_clips) - len(unreadable_keys), len(new_texts), started)


def _make_plan(
    data: DataConfig, clips_folder: Path, model_hashes: Mapping[str, str], max_length: int, images: int
) -> _Plan:
    entries = read_index(clips_folder)
    mine = [read_item(entry, data) for entry in entries[ranks.rank() :: ranks.world_size()]]
    shares = [iter(share) for share in ranks.gather(mine)]
    items = [next(shares[position % len(shares)]) for position in range(len(entries))]
    text_hashes = {name: value for name, value in model_hashes.items() if name != "vae"}
    vae = model_hashes["vae"]
    clip_keys = [
        clip_key(item.content, buckets.sized(data, item.bucket), vae, images) if item.content else None
        for item in items
    ]
    text_keys = [text_key(item.entry.text, text_hashes, max_length) for item in items]
    empty = text_key("", text_hashes, max_length)
    named = [[item.entry.name, clip, text] for item, clip, text in zip(items, clip_keys, text_keys, strict=True)]
    # PyAV's version is in: another one may read what this one could not.
    settings = {name: getattr(data, name) for name in (*SETTINGS, "holdout", "max_bad_share")} | _more_settings(
        data, images
    )
    return _Plan(
        items,
        clip_keys,
        text_keys,
        empty,
        digest(CacheIndex.version, named, settings, dict(model_hashes), av.__version__),
    )


def _more_settings(data: DataConfig, images: int) -> dict[str, Any]:
    """Settings that shape clips where they are used: without buckets and images a folder is named as it was before there were any."""
    return ({"buckets": list(data.buckets)} if data.buckets else {}) | ({"image_variants": images} if images else {})


def _survey(folder: Path, plan: _Plan) -> tuple[set[str], set[str], CacheIndex | None]:
    """What the folder holds already: clip keys, caption keys, and its index if nothing at all has changed."""
    folder.mkdir(parents=True, exist_ok=True)
    cache_shards.sweep(folder)
    found = cache_shards.scan(folder, CLIPS).keys(), cache_shards.scan(folder, TEXTS).keys()
    index_file = folder / CacheIndex.file_name
    try:
        index = read_record(index_file, CacheIndex)
        if index.plan == plan.identity:
            cache.LatentCache(folder)
            return set(found[0]), set(found[1]), index
    except DataError:
        pass
    index_file.unlink(missing_ok=True)
    return set(found[0]), set(found[1]), None


def _finish(
    folder: Path,
    plan: _Plan,
    data: DataConfig,
    model_hashes: Mapping[str, str],
    max_length: int,
    quarantine: Quarantine,
    images: int,
) -> CacheIndex:
    """Write the index over all shards, and remove the shards that it does not name."""
    stored_clips, stored_texts = cache_shards.scan(folder, CLIPS), cache_shards.scan(folder, TEXTS)
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
                bucket=item.bucket or None,
            )
        )
    quarantine.write()
    if not entries:
        raise quarantine.stop("no clip can be read")
    train, holdout = cache.split(sources, data.holdout)
    index = CacheIndex(
        plan=plan.identity,
        fingerprint=cache.fingerprint(
            [entry.key for entry in entries], [entries[position].key for position in holdout]
        ),
        settings=CacheSettings(
            **{name: getattr(data, name) for name in SETTINGS},
            max_length=max_length,
            buckets=list(data.buckets),
            image_variants=images,
        ),
        models=dict(model_hashes),
        counts=CacheCounts(
            unreadable=len(quarantine.rows),
            upscaled=sum(clips[entry.name].upscaled for entry in entries),
            slower=sum(clips[entry.name].fps < 0.99 * data.fps for entry in entries),
        ),
        empty=CaptionEntry(plan.empty_key, stored_texts[plan.empty_key].shard),
        train=train,
        holdout=holdout,
        entries=entries,
        softness=softness.summarise_softness(
            clips, {entry.name: entry.bucket for entry in entries if entry.bucket}, data
        ),
    )
    write_record(folder / CacheIndex.file_name, index)
    used = {shard for entry in entries for shard in (entry.clip_shard, entry.text_shard)} | {index.empty.text_shard}
    cache_shards.prune(folder, used)
    return index


def _result(
    folder: Path, index: CacheIndex, encoded_clips: int, encoded_captions: int, started: float
) -> PrepareResult:
    counts, settings, total = index.counts, index.settings, len(index.entries)
    warnings = []
    if counts.unreadable:
        warnings.append(f"{counts.unreadable} clips are unreadable and left out; {folder / QUARANTINE} says why")
    if counts.upscaled:
        size = "their bucket" if settings.buckets else f"{settings.width}x{settings.height}"
        own = ", ".join(f"{count} of {one}" for one, count in list(index.softness.upscaled.items())[:4])
        warnings.append(
            f"{counts.upscaled} of {total} clips are smaller than {size} and were upscaled{f' ({own})' if own else ''}: "
            "they are soft, and a model learns that. Leave them out or lower data.height and data.width"
        )
    if counts.slower:
        warnings.append(
            f"{counts.slower} of {total} clips have fewer than data.fps={settings.fps:g} frames a second: "
            "frames are repeated"
        )
    return PrepareResult(
        folder=folder,
        clips=total,
        train=len(index.train),
        holdout=len(index.holdout),
        encoded_clips=encoded_clips,
        encoded_captions=encoded_captions,
        fingerprint=index.fingerprint,
        seconds=time.monotonic() - started,
        warnings=warnings,
        softness=index.softness,
        buckets=cache.count_by_bucket(index),
        unreadable=counts.unreadable,
        upscaled=counts.upscaled,
        slower=counts.slower,
    )
