"""Encode clips through the VAE and captions through the text encoder into shards, and collect unreadable clips.

Image-to-video training also needs a clip's first frame with noise. SAT (``add_noise_to_first_frame`` in
sat/diffusion_video.py of zai-org/CogVideo) draws new noise at each step. Here the VAE is not loaded in training, so a
fixed number of noised frames is encoded in advance, and each step draws one of them. The noise depends only on the
clip's content.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogflow.config.data_section import DataConfig
from cogflow.data import clips, softness
from cogflow.data.buckets import assign_bucket, at_bucket_size
from cogflow.data.clip_index import ClipEntry
from cogflow.data.clips import Clip, read_clip
from cogflow.data.latent_cache import CLIPS, FIRST_FRAME, TEXTS, ShardWriter, first_frame_names
from cogflow.data.media import require_regular
from cogflow.data.media_bytes import ClipError
from cogflow.data.quarantine import MISSING, FileStamp, Quarantine, file_stamp, stamp_or_none
from cogflow.errors import DataError, QualityGateError
from cogflow.files.hashing import hash_file
from cogflow.models.transformer_inputs import SIGMA_MEAN, SIGMA_STD
from cogflow.records.cache_records import ClipMeasurement, StoredClip
from cogflow.runtime.progress import Advancing
from cogflow.sharpness.metrics import measure

TEXT_VERSION = 1
"""Version of the embeddings: increased when the same caption gives others. Part of each caption's key."""
FIRST_FRAME_VERSION = 1
"""Version of the first frame's tensors: increased when they change. Part of each clip's key for image to video."""

_MOST_AT_ONCE = 8  # clips that are decoded at a time, each some 100 MB at 49x480x720


OpenProgress = Callable[[int, str], AbstractContextManager[Advancing]]
"""(total, description) -> an open progress bar."""

Embed = Callable[[Sequence[str]], torch.Tensor]
"""Captions -> embeddings ``[N, L, D]``."""


@dataclass(frozen=True)
class SourceClip:
    """One clip of the index with the hash of its bytes (``content``) and its bucket, or the ``reason`` for failure.

    ``stamp``: size and modification time of the file when it was hashed.
    """

    entry: ClipEntry
    content: str | None
    stamp: FileStamp | None
    reason: str | None
    bucket: str | None = None


def read_source_clip(entry: ClipEntry, data: DataConfig) -> SourceClip:
    """Hash the file of ``entry`` and choose its bucket."""
    try:
        require_regular(entry.path.stat())
        stamp = file_stamp(entry.path)
        bucket = assign_bucket(entry.path, data) if data.buckets else None
        return SourceClip(entry, hash_file(entry.path), stamp, None, bucket)
    except ClipError as error:
        return SourceClip(entry, None, stamp_or_none(entry.path), error.reason)
    except FileNotFoundError:
        return SourceClip(entry, None, None, MISSING)
    except OSError as error:
        return SourceClip(entry, None, None, f"cannot be read: {error.strerror}")


def digest(*parts: Any) -> str:
    """Return the SHA-256 over JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def clip_settings(data: DataConfig) -> dict[str, Any]:
    """Return the settings that shape a clip's frames; the seed only where a choice is random."""
    settings = {name: getattr(data, name) for name in clips.CLIP_SETTINGS}
    if "random" not in (data.crop, data.window):
        del settings["seed"]
    return settings


def clip_key(content: str, data: DataConfig, vae_hash: str, images: int = 0) -> str:
    """Return the key of a clip's tensors.

    ``images``: noised first frames that are stored with it; 0 for text to video.
    """
    more = [["first frame", FIRST_FRAME_VERSION, images]] if images else []
    return digest("clip", clips.VERSION, content, clip_settings(data), vae_hash, *more)


def text_key(text: str, text_hashes: Mapping[str, str], max_length: int) -> str:
    """Return the key of a caption's embedding."""
    return digest("text", TEXT_VERSION, text, dict(text_hashes), max_length)


def require_readable_clip(items: Sequence[SourceClip], quarantine: Quarantine) -> None:
    """Check that one of the first ``data.max_bad_in_a_row`` clips can be read, before any model is loaded.

    Raises :class:`DataError` when none can be read, so that an unreadable data set ends the run within seconds.
    """
    data = quarantine.data
    first = items[: max(1, data.max_bad_in_a_row)]
    for item in first:
        reason = item.reason
        if reason is None:
            try:
                read_clip(item.entry.path, at_bucket_size(data, item.bucket), item.content)
                return
            except ClipError as error:
                reason = error.reason
        quarantine.rows[item.entry.name] = reason
    raise quarantine.stop(f"none of the first {len(first)} clips can be read")


@dataclass(frozen=True)
class ShardOutput:
    """Number of clips or captions of a shard, and the function that opens a progress bar."""

    shard_items: int
    report: OpenProgress


def encode_captions(
    texts: Mapping[str, str], load: Callable[[], Embed], folder: Path, batch: int, output: ShardOutput
) -> None:
    """Embed ``texts`` (caption by key) into shards of ``folder``.

    The encoder is loaded only when there is work, and freed after.
    """
    if not texts:
        return
    embed = load()
    keys = list(texts)
    with output.report(len(keys), "captions") as bar, ShardWriter(folder, TEXTS, output.shard_items) as writer:
        for start in range(0, len(keys), batch):
            some = keys[start : start + batch]
            for key, embeds in zip(some, embed([texts[key] for key in some]), strict=True):
                _check_finite(embeds, "text encoder", f"caption {texts[key]!r}")
                # Without the copy the writer would keep and write the whole batch.
                writer.add(key, {"embeds": embeds.clone()})
            bar.advance(len(some))
    del embed
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class ClipWork:
    """Clips to encode by key, and all names in the index of each key: several files may have the same content."""

    clips: Mapping[str, SourceClip]
    names: Mapping[str, Sequence[str]]


def encode_clips(
    work: ClipWork,
    load: Callable[[], Any],
    folder: Path,
    quarantine: Quarantine,
    output: ShardOutput,
    images: int,
) -> None:
    """Encode the clips of ``work`` one by one into shards of ``folder``; add unreadable ones to ``quarantine``.

    The VAE is loaded only when there is work. Threads decode the next clips while one is encoded. ``images``: number
    of noised first frames to encode with each clip, for image to video.
    """
    if not work.clips:
        return
    vae, data = load(), quarantine.data
    # Keys are hashes, so the smallest are a random sample of the clips, whatever their order.
    compared = set(sorted(work.clips)[: softness.RESAMPLED])
    with output.report(len(work.clips), "clips") as bar, ShardWriter(folder, CLIPS, output.shard_items) as writer:
        for key, item, clip, measurement in _decoded(work.clips, data, compared):
            if item.stamp != stamp_or_none(item.entry.path):
                raise DataError(
                    f"{item.entry.path} changed while it was prepared",
                    "run the command again when no other process changes the clips",
                )
            if isinstance(clip, ClipError):
                for name in work.names[key]:
                    quarantine.add(name, clip.reason)
                bar.advance(1, "skipped")
                continue
            tensors, stored = _encode_clip(vae, item, clip, measurement, images)
            writer.add(key, tensors, stored)
            bar.advance(1)


def _encode_clip(
    vae: Any, item: SourceClip, clip: Clip, measurement: ClipMeasurement | None, images: int
) -> tuple[dict[str, torch.Tensor], StoredClip]:
    """Return the tensors to store for one clip, and its record with the metrics of its frames."""
    mean, logvar = encode_frames(vae, clip.frames)
    _check_finite(mean, "VAE", item.entry.name)
    if measurement is not None:
        measurement = replace(measurement, metrics=measure(clip.frames.to(vae.device)))
    stored = StoredClip(clip.upscaled, clip.source_size, clip.source_fps, clip.source_frames, measurement)
    tensors = {"mean": mean, "logvar": logvar}
    if images:
        tensors |= encode_first_frame(vae, clip.frames[0], item.content or "", images)
    return tensors, stored


@torch.no_grad()
def encode_moments(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and log variance of ``pixels``: fp32 ``[16, t, h, w]`` on the CPU.

    ``pixels``: ``[1, 3, T, H, W]`` in [-1, 1] on the VAE's device.
    """
    posterior = vae.encode(pixels).latent_dist
    return posterior.mean[0].float().cpu(), posterior.logvar[0].float().cpu()


def encode_frames(vae: Any, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and log variance of uint8 frames ``[T, H, W, 3]``: fp32 ``[16, t, h, w]``, not scaled.

    ``vae``: an ``AutoencoderKLCogVideoX``.
    """
    return encode_moments(vae, vae_input(frames, vae.device, vae.dtype))


def vae_input(frames: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return uint8 frames ``[T, H, W, 3]`` as a VAE takes them: ``[1, 3, T, H, W]`` in [-1, 1]."""
    return frames.to(device).permute(3, 0, 1, 2)[None].to(dtype).div_(127.5).sub_(1.0)


def encode_first_frame(vae: Any, frame: torch.Tensor, content: str, variants: int) -> dict[str, torch.Tensor]:
    """Return the tensors to store for a first frame (uint8 ``[H, W, 3]``) of a clip with the hash ``content``.

    These are the frame itself and, for each variant, mean and log variance with noise, fp32 ``[16, 1, h, w]``, not
    scaled.
    """
    tensors = {FIRST_FRAME: frame.clone()}
    for variant in range(variants):
        noisy = add_first_frame_noise(frame, content, variant)
        moments = encode_moments(vae, noisy[None, :, None].to(vae.device, vae.dtype))
        tensors |= dict(zip(first_frame_names(variant), moments, strict=True))
    return tensors


def add_first_frame_noise(frame: torch.Tensor, content: str, variant: int) -> torch.Tensor:
    """Return ``frame``, uint8 ``[H, W, 3]``, in [-1, 1] plus normal noise of a log-normal scale: fp32 ``[3, H, W]``."""
    seed = hashlib.sha256(f"first frame/{variant}/{content}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(seed[:8], "big"))
    sigma = math.exp(rng.normal(SIGMA_MEAN, SIGMA_STD))
    pixels = frame.permute(2, 0, 1).float() / 127.5 - 1.0
    return pixels + sigma * torch.from_numpy(rng.standard_normal(tuple(pixels.shape), dtype=np.float32))


DecodedClip = tuple[Clip | ClipError, ClipMeasurement | None]
"""A clip, or the error for an unreadable one, and its measurement."""


def _decoded(
    items: Mapping[str, SourceClip], data: DataConfig, compared: set[str]
) -> Iterator[tuple[str, SourceClip, Clip | ClipError, ClipMeasurement | None]]:
    """Yield ``items`` in order with their decoded clips; as many as fit the cores are decoded ahead."""

    def read(key: str, item: SourceClip) -> DecodedClip:
        at_size = at_bucket_size(data, item.bucket)
        try:
            clip = read_clip(item.entry.path, at_size, item.content)
        except ClipError as error:
            return error, None
        return clip, softness.measure_softness(clip, at_size, item.content or "", resampled=key in compared)

    ahead: deque[tuple[str, SourceClip, Future[DecodedClip]]] = deque()
    count = clips_at_once()
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


def clips_at_once() -> int:
    """Return the number of clips that are decoded at a time: one for each core of this rank."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(2, min(_MOST_AT_ONCE, len(os.sched_getaffinity(0)) // local_ranks))


@contextmanager
def clip_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Provide ``count`` threads in which torch uses one thread each, because several clips at a time fill the cores."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, "clips", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        # ``set_num_threads`` applies to the calling thread and to threads that start later.
        torch.set_num_threads(threads)


def _check_finite(values: torch.Tensor, model: str, what: str) -> None:
    if not torch.isfinite(values).all():
        raise QualityGateError(
            f"the {model} gives values that are not finite for {what}", f"check the {model}'s weights and dtype"
        )
