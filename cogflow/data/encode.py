"""The work of preparing: content hashes, captions through the text encoder, clips through the VAE, and what was unreadable."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from cogflow.config.data_section import DataConfig
from cogflow.data import buckets, clips, first_frame, softness
from cogflow.data.cache_shards import ShardWriter
from cogflow.data.clip_index import ClipEntry
from cogflow.errors import DataError, QualityGateError
from cogflow.files.atomic_write import write_text
from cogflow.files.hashing import hash_file
from cogflow.records.cache_records import ClipMeasurement, StoredClip
from cogflow.sharpness.metrics import measure

QUARANTINE = "quarantine.jsonl"
CLIPS, TEXTS = "clips", "texts"
"""Kinds of shards: ``<clip key>.mean`` and ``.logvar``; ``<caption key>.embeds``."""

TEXT_VERSION = 1
_MOST_AT_ONCE = 8  # clips in the making, each some 100 MB at 49x480x720
_SHOWN = 5


class Bar(Protocol):
    def advance(self, n: int = 1, note: str = "") -> None: ...


Report = Callable[[int, str], AbstractContextManager[Bar]]
"""Opens a progress bar: (total, description)."""

Embed = Callable[[Sequence[str]], torch.Tensor]
"""Captions to embeddings ``[N, L, D]``."""


@dataclass(frozen=True)
class Item:
    """One clip of the index with the hash of its bytes and its bucket where there are any, or the reason why it has none."""

    entry: ClipEntry
    content: str | None
    stamp: tuple[int, int] | None
    reason: str | None
    bucket: str | None = None


def read_item(entry: ClipEntry, data: DataConfig) -> Item:
    try:
        stamp = _stamp(entry.path)
        bucket = buckets.assign(entry.path, data) if data.buckets else None
        return Item(entry, hash_file(entry.path), stamp, None, bucket)
    except clips.ClipError as error:
        return Item(entry, None, None, error.reason)
    except FileNotFoundError:
        return Item(entry, None, None, "the file is missing")
    except OSError as error:
        return Item(entry, None, None, f"cannot be read: {error.strerror}")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def clip_settings(data: DataConfig) -> dict[str, Any]:
    """The settings that shape a clip's frames; the seed only where something is random."""
    settings = {name: getattr(data, name) for name in clips.SETTINGS}
    if "random" not in (data.crop, data.window):
        del settings["seed"]
    return settings


def clip_key(content: str, data: DataConfig, vae_hash: str, images: int = 0) -> str:
    """``images``: noised first frames that are stored beside the clip; none for text to video."""
    more = [["first frame", first_frame.VERSION, images]] if images else []
    return digest("clip", clips.VERSION, content, clip_settings(data), vae_hash, *more)


def text_key(text: str, text_hashes: Mapping[str, str], max_length: int) -> str:
    return digest("text", TEXT_VERSION, text, dict(text_hashes), max_length)


class Quarantine:
    """Unreadable clips by name, with the reason, and the bound on how many there may be."""

    def __init__(self, data: DataConfig, total: int, file: Path) -> None:
        self.rows: dict[str, str] = {}
        self._total, self._file = total, file
        self._share = data.max_bad_share
        self._allowed = int(data.max_bad_share * total + 1e-9)

    def add(self, name: str, reason: str) -> None:
        """Note a clip. Raises :class:`DataError` when there are more than ``data.max_bad_share`` allows."""
        self.rows[name] = reason
        if len(self.rows) > self._allowed:
            limit = f"data.max_bad_share={self._share:g} allows {self._allowed}"
            raise self.stop(f"{len(self.rows)} of {self._total} clips are unreadable so far; {limit}")

    def stop(self, message: str) -> DataError:
        """The error that ends the run, with examples; the full list is written first."""
        self.write()
        examples = "".join(f"\n    {name}: {reason}" for name, reason in list(self.rows.items())[:_SHOWN])
        return DataError(
            message + examples, f"mend or remove them (all are in {self._file}), or raise data.max_bad_share"
        )

    def write(self) -> None:
        """One JSON object a line, name and reason; no file when there is nothing to list."""
        if self.rows:
            write_text(
                self._file, "".join(json.dumps({"name": n, "reason": r}) + "\n" for n, r in sorted(self.rows.items()))
            )
        else:
            self._file.unlink(missing_ok=True)


def probe(items: Sequence[Item], data: DataConfig, quarantine: Quarantine) -> None:
    """Find one clip that can be read among the first ``data.max_bad_in_a_row``, before any model is loaded.

    Raises :class:`DataError` when there is none: a wholly bad set ends in seconds.
    """
    first = items[: max(1, data.max_bad_in_a_row)]
    for item in first:
        reason = item.reason
        if reason is None:
            try:
                clips.read_clip(item.entry.path, buckets.sized(data, item.bucket), item.content)
                return
            except clips.ClipError as error:
                reason = error.reason
        quarantine.rows[item.entry.name] = reason
    raise quarantine.stop(f"none of the first {len(first)} clips can be read")


def encode_captions(
    texts: Mapping[str, str], load: Callable[[], Embed], folder: Path, *, batch: int, shard: int, report: Report
) -> None:
    """Embed ``texts`` (caption by key) into shards of ``folder``. The encoder is loaded only when there is work, and freed after."""
    if not texts:
        return
    embed = load()
    keys = list(texts)
    with report(len(keys), "captions") as bar, ShardWriter(folder, TEXTS, shard) as writer:
        for start in range(0, len(keys), batch):
            some = keys[start : start + batch]
            for key, embeds in zip(some, embed([texts[key] for key in some]), strict=True):
                _check_finite(embeds, "text encoder", f"caption {texts[key]!r}")
                # A clone, since a view would keep and write the whole batch.
                writer.add(key, {"embeds": embeds.clone()})
            bar.advance(len(some))
    del embed
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def encode_clips(
    items: Mapping[str, Item],
    names: Mapping[str, Sequence[str]],
    load: Callable[[], Any],
    folder: Path,
    data: DataConfig,
    quarantine: Quarantine,
    *,
    images: int,
    shard: int,
    report: Report,
) -> None:
    """Encode ``items`` (by clip key) one by one into shards of ``folder``; unreadable ones go to ``quarantine``.

    ``names`` are the index's names of each key: several files may have one content. The VAE is loaded only when there
    is work. Clips are decoded a little ahead, in threads. ``images``: noised first frames to encode besides, for image to video.
    """
    if not items:
        return
    vae = load()
    # Keys are hashes: the smallest are a sample of the clips that no order of theirs can shape.
    compared = set(sorted(items)[: softness.RESAMPLED])
    with report(len(items), "clips") as bar, ShardWriter(folder, CLIPS, shard) as writer:
        for key, item, clip, measurement in _decoded(items, data, compared):
            if item.stamp != _stamp_or_none(item.entry.path):
                raise DataError(
                    f"{item.entry.path} changed while it was prepared",
                    "run the command again when the clips are at rest",
                )
            if isinstance(clip, clips.ClipError):
                for name in names[key]:
                    quarantine.add(name, clip.reason)
                bar.advance(1, "skipped")
                continue
            mean, logvar = encode_frames(vae, clip.frames)
            _check_finite(mean, "VAE", item.entry.name)
            if measurement is not None:
                measurement = replace(measurement, metrics=measure(clip.frames.to(vae.device)))
            stored = StoredClip(clip.upscaled, clip.source_size, clip.source_fps, clip.source_frames, measurement)
            tensors = {"mean": mean, "logvar": logvar}
            if images:
                tensors |= first_frame.encode(vae, clip.frames[0], item.content or "", images)
            writer.add(key, tensors, stored)
            bar.advance(1)


@torch.no_grad()
def encode_frames(vae: Any, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance of uint8 frames ``[T, H, W, 3]`` from an ``AutoencoderKLCogVideoX``: fp32 ``[16, t, h, w]``, not scaled."""
    return first_frame.moments(vae, pixels(frames, vae.device, vae.dtype))


def pixels(frames: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """uint8 frames ``[T, H, W, 3]`` as a VAE takes them: ``[1, 3, T, H, W]`` in [-1, 1]."""
    return frames.to(device).permute(3, 0, 1, 2)[None].to(dtype).div_(127.5).sub_(1.0)


Decoded = tuple[clips.Clip | clips.ClipError, ClipMeasurement | None]
"""A clip and its measurement."""


def _decoded(
    items: Mapping[str, Item], data: DataConfig, compared: set[str]
) -> Iterator[tuple[str, Item, clips.Clip | clips.ClipError, ClipMeasurement | None]]:
    def read(key: str, item: Item) -> Decoded:
        at_size = buckets.sized(data, item.bucket)
        try:
            clip = clips.read_clip(item.entry.path, at_size, item.content)
        except clips.ClipError as error:
            return error, None
        return clip, softness.measure_softness(clip, at_size, item.content or "", resampled=key in compared)

    ahead: deque[tuple[str, Item, Future[Decoded]]] = deque()
    count = at_once()
    with clip_threads(count) as pool:
        try:
            for key, item in items.items():
                ahead.append((key, item, pool.submit(read, key, item)))
                if len(ahead) > count:
                    first_key, first, result = ahead.popleft()
                    yield first_key, first, *result.result()
            while ahead:
                first_key, first, result = ahead.popleft()
                yield first_key, first, *result.result()
        finally:
            for _, _, waiting in ahead:
                waiting.cancel()


def at_once() -> int:
    """Clips that are decoded at a time: one for each core of this rank."""
    return max(2, min(_MOST_AT_ONCE, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@contextmanager
def clip_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that torch does not divide further: the clips themselves fill the cores."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, "clips", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        # What a thread sets is its own, but threads that are started later take the number that was set last.
        torch.set_num_threads(threads)


def _stamp_or_none(path: Path) -> tuple[int, int] | None:
    try:
        return _stamp(path)
    except OSError:
        return None


def _check_finite(values: torch.Tensor, model: str, what: str) -> None:
    if not torch.isfinite(values).all():
        raise QualityGateError(
            f"the {model} gives values that are not finite for {what}", f"check the {model}'s weights and dtype"
        )
