"""Encode clips and captions once, keyed by content: reuse what is unchanged, encode what changed.

A clip's tensors have a key: the hash of the file's bytes, of the settings that shape its frames and of the VAE. A
caption's key hashes its text and the text encoder. A changed clip, caption, setting or encoder has another key, so
outdated tensors cannot be found. Shards are published as they fill, so a killed run continues where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import av

from cogflow.config.config import Config
from cogflow.config.data_section import DataConfig
from cogflow.config.train_settings import PrepareStage
from cogflow.data import latent_cache
from cogflow.data.buckets import at_bucket_size
from cogflow.data.clip_index import read_index
from cogflow.data.clip_usage import count_usage, usage_notes, usage_warnings
from cogflow.data.clips import CLIP_SETTINGS
from cogflow.data.data_changes import ClipState, compare_index
from cogflow.data.encode import (
    ClipWork,
    Embed,
    OpenProgress,
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
from cogflow.data.former_index import former_shards, index_shards, keep_index, trained_step
from cogflow.data.holdout import MOST_HELD_OUT, resolve_holdout, split_holdout
from cogflow.data.latent_cache import CLIPS, TEXTS, LatentCache, clips_per_bucket, scan_shards
from cogflow.data.quarantine import QUARANTINE, Quarantine, read_quarantine
from cogflow.data.softness import summarise_softness
from cogflow.errors import DataError, format_list
from cogflow.files.record_io import read_record, write_record
from cogflow.records.cache_records import (
    CacheEntry,
    CacheIndex,
    CacheSettings,
    CaptionEntry,
    SoftnessRecord,
    StoredClip,
)
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.runtime.heartbeat import enter_phase

MOST_LEFT_OUT = 100
"""Unreadable clips that the result names; ``quarantine.jsonl`` names all."""


@dataclass(frozen=True)
class PrepareResult:
    """Content of the cache in ``folder``, and the work and seconds of this preparation.

    ``upscaled`` and ``slower``: number of usable clips that are smaller than the wanted size, or have fewer frames per
    second than wanted; ``warnings`` has a sentence on each. ``notes``: on what of the data is not trained on.
    ``left_out``: reasons by name of the first unreadable clips. ``buckets``: number of training clips by bucket, empty
    without buckets. ``changes``: lines on the differences from the clips that were prepared before; empty without any.
    ``trained_step``: the last step of this run on the clips that were replaced; None where it was not trained on them.
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
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    trained_step: int | None = None


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
    """Keys that this preparation needs. ``settings``: of the index.

    ``identities``: the first is equal for equal data, settings and encoders; the others are of former versions for the
    same settings.
    """

    items: list[SourceClip]
    clip_keys: list[str | None]
    text_keys: list[str]
    empty_key: str
    identities: tuple[str, ...]
    settings: CacheSettings

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
    """Keys that are already in the folder, and its index when nothing has changed; else the changes.

    ``fingerprint``: of the clips before the update; ``trained_step``: the last step that the run was trained on them.
    """

    clips: set[str]
    texts: set[str]
    index: CacheIndex | None = None
    changes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    trained_step: int | None = None

    def replaced_step(self, index: CacheIndex) -> int | None:
        """Return the last step that was trained on other clips than those of ``index``; None without such a step."""
        return self.trained_step if index.fingerprint != self.fingerprint else None


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
    existing = ranks.run_on_main(lambda: _survey(folder, plan, inputs))
    if existing.index is not None:
        return _result(folder, clips_folder, existing.index, _Work(started))

    if existing.changes:
        echo(f"updating the prepared clips in {folder}:\n{format_list(existing.changes)}")
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
    if (step := existing.replaced_step(index)) is not None:
        echo(
            f"warning: this run was trained up to step {step} on the clips before this update. They are kept: "
            "stage=train goes on with them with stage.changed_data=use_prepared. Else it stops, and names the command "
            "that starts a new run on the new clips from these weights"
        )
    done = _Work(started, len(new_clips) - len(unreadable_keys), len(new_texts))
    return _result(folder, clips_folder, index, done, existing)


def _make_plan(data: DataConfig, clips_folder: Path, inputs: EncoderInputs) -> _Plan:
    entries = read_index(clips_folder)
    holdout = resolve_holdout(data.holdout, len(entries), f"clips are listed in {clips_folder}")
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
    settings = {name: getattr(data, name) for name in (*CLIP_SETTINGS, "max_bad_share")}
    # Without buckets and images a cache has the identity that it had before these settings existed.
    settings |= {"buckets": list(data.buckets)} if data.buckets else {}
    settings |= {"image_variants": inputs.images} if inputs.images else {}
    # Before there was a default in proportion to the clips, it was the largest one.
    holdouts = dict.fromkeys([holdout, *([MOST_HELD_OUT] if data.holdout is None else [])])
    # Another version of PyAV may read what this one could not.
    identities = [
        digest(CacheIndex.version, named, settings | {"holdout": number}, dict(inputs.hashes), av.__version__)
        for number in holdouts
    ]
    return _Plan(
        items=items,
        clip_keys=clip_keys,
        text_keys=text_keys,
        empty_key=text_key("", inputs.text_hashes, inputs.max_length),
        identities=tuple(identities),
        settings=CacheSettings(
            **{name: getattr(data, name) for name in CLIP_SETTINGS},
            max_length=inputs.max_length,
            buckets=list(data.buckets),
            image_variants=inputs.images,
            holdout=holdout,
        ),
    )


def _survey(folder: Path, plan: _Plan, inputs: EncoderInputs) -> _Existing:
    """Return the keys that are already in ``folder``; take its index away when anything has changed.

    An index that a checkpoint of the run was trained on is kept as a former one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    latent_cache.remove_partial_shards(folder)
    clips, texts = set(scan_shards(folder, CLIPS)), set(scan_shards(folder, TEXTS))
    index_file = folder / CacheIndex.file_name
    if not index_file.is_file():
        return _Existing(clips, texts)
    try:
        index = read_record(index_file, CacheIndex)
    except DataError as error:
        index_file.unlink()
        return _Existing(clips, texts, changes=[f"the former list of clips cannot be read: {error.message}"])
    if index.plan in plan.identities:
        try:
            LatentCache(folder)
            return _Existing(clips, texts, _with_present_files(folder, index, plan))
        except DataError as error:
            index_file.unlink()
            return _Existing(clips, texts, changes=[error.message])
    pairs = zip(plan.items, plan.clip_keys, strict=True)
    present = ((item.entry.name, ClipState(item.entry.text, key)) for item, key in pairs if key is not None)
    changes = compare_index(index, present, plan.settings, dict(inputs.hashes)).lines()
    changes = changes or ["the order of the clips, the held-out clips or the version of PyAV"]
    trained = trained_step(folder.parent, index.fingerprint)
    if trained is None:
        index_file.unlink()
    else:
        keep_index(folder, index)
    return _Existing(clips, texts, None, changes, index.fingerprint, trained)


def _with_present_files(folder: Path, index: CacheIndex, plan: _Plan) -> CacheIndex:
    """Return ``index`` with the present sizes and times of the files; write it where they differ.

    A copied folder has new times. With them in the index, training need not hash the files to see that they are equal.
    """
    stamps = {item.entry.name: item.stamp for item in plan.items if item.stamp is not None}
    entries = [
        replace(entry, size=stamps[entry.name][0], modified_ns=stamps[entry.name][1]) if entry.name in stamps else entry
        for entry in index.entries
    ]
    holdout = index.settings.holdout
    if holdout is None and index.plan == plan.identities[0]:
        holdout = plan.settings.holdout
    present = replace(index, entries=entries, settings=replace(index.settings, holdout=holdout))
    if present != index:
        write_record(folder / CacheIndex.file_name, present)
    return present


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
                size=item.stamp[0] if item.stamp is not None else None,
                modified_ns=item.stamp[1] if item.stamp is not None else None,
            )
        )
    quarantine.write({item.entry.name: item.stamp[0] for item in plan.items if item.stamp is not None})
    if not entries:
        raise quarantine.stop("no clip can be read")
    if data.holdout is not None:
        resolve_holdout(data.holdout, len(entries), "clips can be read")
    train, holdout = split_holdout(sources, plan.settings.holdout or 0)
    keys = [entry.key for entry in entries]
    index = CacheIndex(
        plan=plan.identities[0],
        fingerprint=latent_cache.cache_fingerprint(keys, [keys[position] for position in holdout]),
        settings=plan.settings,
        models=dict(inputs.hashes),
        counts=count_usage(entries, clips, data, unreadable=len(quarantine.rows)),
        empty=CaptionEntry(plan.empty_key, stored_texts[plan.empty_key].shard),
        train=train,
        holdout=holdout,
        entries=entries,
        softness=summarise_softness(clips, {entry.name: entry.bucket for entry in entries if entry.bucket}, data),
    )
    write_record(folder / CacheIndex.file_name, index)
    try:
        latent_cache.remove_unused_shards(folder, index_shards(index) | former_shards(folder))
    except DataError as error:
        echo(f"note: unused files of {folder} are not removed: {error.message}")
    return index


@dataclass(frozen=True)
class _Work:
    """Work of this preparation. ``started``: by the monotonic clock."""

    started: float
    encoded_clips: int = 0
    encoded_captions: int = 0


def _result(
    folder: Path, clips_folder: Path, index: CacheIndex, work: _Work, existing: _Existing | None = None
) -> PrepareResult:
    return PrepareResult(
        folder=folder,
        clips=len(index.entries),
        train=len(index.train),
        holdout=len(index.holdout),
        encoded_clips=work.encoded_clips,
        encoded_captions=work.encoded_captions,
        unreadable=index.counts.unreadable,
        upscaled=index.counts.upscaled,
        slower=index.counts.slower,
        fingerprint=index.fingerprint,
        seconds=time.monotonic() - work.started,
        warnings=usage_warnings(folder, index),
        softness=index.softness,
        buckets=clips_per_bucket(index),
        notes=ranks.run_on_main(lambda: usage_notes(index, clips_folder, folder)),
        left_out={one.name: one.reason for one in islice(read_quarantine(folder), MOST_LEFT_OUT)},
        changes=existing.changes if existing is not None else [],
        trained_step=existing.replaced_step(index) if existing is not None else None,
    )
