"""The roundtrip rung: clips through the VAE and back, decoded as training's samples are. It bounds what a sample can
reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from cogflow.config.config import AnyConfig
from cogflow.data.buckets import at_bucket_size
from cogflow.data.clip_index import read_index
from cogflow.data.clips import read_clip
from cogflow.data.encode import clip_key
from cogflow.data.latent_cache import LatentCache
from cogflow.data.media import file_size
from cogflow.data.media_bytes import ClipError
from cogflow.errors import CogflowError
from cogflow.files.hashing import hash_file
from cogflow.ladder.crop_sheet import FramesByTitle, write_crop_sheet
from cogflow.ladder.ladder_record import read_ladder, write_rung
from cogflow.ladder.rung import Rung
from cogflow.models.loading import dtype_name
from cogflow.records.ladder_records import DecodingVariant, RoundtripIdentity, RoundtripRung
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.sampling.sampler import Sampler
from cogflow.sharpness.metrics import Metrics, measure
from cogflow.sharpness.psnr import frames_psnr

SCALED_CLIPS = 2  # clips whose first frame is decoded at other scales, too
TRIAL_FRAMES = (
    3  # latent frames of the first clip that are decoded in other precisions, too; an odd number, as clips have
)
FACTORS = (0.5, 0.607, 0.8, 1.25, 1.6465, 2.0)
"""Factors on the latents that are tried beside 1: 0.607 and 1.6465 are 0.7 / 1.15258426 and its inverse, the others
surround them.
"""
CLIPS_SHEET = Path("ladder", "clips.png")


@dataclass(frozen=True)
class RoundtripClip:
    """A clip to send through the VAE.

    ``frames``: as the loader returns them, 0..1, ``[T, H, W, 3]``; ``source``: a few source frames, and ``source_at``
    their indices; ``mean``: the cached latents, not scaled, ``[channels, frames, h, w]``.
    """

    name: str
    frames: torch.Tensor
    source: torch.Tensor
    source_at: tuple[int, ...]
    mean: torch.Tensor

    def scaled_latents(self, scaling_factor: float) -> torch.Tensor:
        """Return fp32 ``[frames, channels, h, w]``, as a sampler returns latents."""
        return scaling_factor * self.mean.float().transpose(0, 1)


def measure_roundtrip(
    folder: Path, config: AnyConfig, cache: LatentCache, sampler: Sampler, scaling_factor: float
) -> dict[str, Metrics]:
    """Decode cached latents times ``scaling_factor`` (training's own) with ``sampler``; return the metrics of each
    decoded clip by its name.

    ``folder`` is the run's. Every rank calls it and gets the same; rank 0 works. ``config.sampling.roundtrip_clips``
    clips, evenly spread over the prepared clips, are decoded; 0 turns it off. The result is empty then, and where no
    clip file is left. The roundtrip rung of ``folder/ladder.json`` is written with PSNR per clip and trials of scale,
    precision and tiling. A resumed run whose ladder has it already for the same cache, VAE and factor reads it from
    there. Call it once before the first validation.
    """
    metrics = _measure(folder, config, cache, sampler, scaling_factor) if ranks.is_main() else None
    shared: dict[str, Metrics] = ranks.broadcast(metrics)
    return shared


def clips_folder(folder: Path, config: AnyConfig) -> Path:
    """Return the folder of the clips of the run in ``folder``."""
    return Path(config.data.path).expanduser() if config.data.path is not None else folder / "data"


def decoder_name(dtype: str, tiling: bool) -> str:
    """Return the name of a decoder trial, such as "fp32, tiled"."""
    return dtype + (", tiled" if tiling else "")


def _measure(
    folder: Path, config: AnyConfig, cache: LatentCache, sampler: Sampler, scaling_factor: float
) -> dict[str, Metrics]:
    identity = RoundtripIdentity(
        cache=cache.fingerprint,
        vae=cache.model_hashes.get("vae"),
        scaling_factor=scaling_factor,
        vae_scaling_factor=float(sampler.vae.config.scaling_factor),
        dtype=dtype_name(sampler.vae.dtype),
        tiling=bool(sampler.vae.use_tiling),
        device=sampler.device.type,
        wanted=config.sampling.roundtrip_clips,
    )
    known = read_ladder(folder).rungs.roundtrip
    if known is not None and known.identity == identity:
        return known.metrics
    decoded_metrics: dict[str, Metrics] = {}
    clip_metrics: dict[str, Metrics] = {}
    psnrs: dict[str, float] = {}
    first_clips: list[RoundtripClip] = []
    pictures: dict[str, FramesByTitle] = {}
    for clip in _read_clips(folder, config, cache):
        decoded = sampler.decode(clip.scaled_latents(scaling_factor))
        clip_metrics[clip.name] = measure(clip.frames)
        decoded_metrics[clip.name] = measure(decoded)
        psnrs[clip.name] = round(frames_psnr(decoded, clip.frames), 3)
        shown = list(clip.source_at)
        pictures[clip.name] = {
            Rung.SOURCE.title: clip.source,
            Rung.CLIP.title: clip.frames[shown],
            Rung.ROUNDTRIP.title: decoded[shown],
        }
        if len(first_clips) < SCALED_CLIPS:
            first_clips.append(clip)
    rung = RoundtripRung(
        metrics=decoded_metrics,
        identity=identity,
        psnr=psnrs,
        clips=clip_metrics,
        non_finite=[name for name, metrics in decoded_metrics.items() if metrics["finite"] < 1],
        scales=_try_scales(sampler, first_clips, scaling_factor),
        variants=_try_decoders(sampler, first_clips, scaling_factor),
    )
    write_rung(folder, Rung.ROUNDTRIP, rung)
    worst = _lowest(psnrs)
    if worst is not None:
        write_crop_sheet(folder / CLIPS_SHEET, {worst: pictures[worst]})
    sampler.finish()
    return decoded_metrics


def _lowest(psnrs: Mapping[str, float]) -> str | None:
    return min(psnrs, key=lambda name: psnrs[name], default=None)


def _read_clips(folder: Path, config: AnyConfig, cache: LatentCache) -> Iterator[RoundtripClip]:
    """Yield clips evenly spread over the cache. A clip whose file is gone or changed gives a note, and the next clip is
    taken.
    """
    # With buckets only clips of the samples' size are comparable with samples; clips of all sizes where there is none
    # of that size.
    size = f"{config.data.frames}x{config.data.height}x{config.data.width}"
    indices = [index for index in range(len(cache)) if cache.bucket(index) in (None, size)] or list(range(len(cache)))
    wanted = min(config.sampling.roundtrip_clips, len(indices))
    if not wanted:
        return
    try:
        paths = {entry.name: entry.path for entry in read_index(clips_folder(folder, config))}
    except CogflowError as error:
        echo(f"note: no round trip of the clips: {error.message.splitlines()[0]}")
        return
    done, missed = 0, 0
    for index in _spread_first(indices, wanted):
        if done == wanted or missed == 2 * wanted:
            break
        try:
            clip = _read_clip(config, cache, index, paths)
        except (KeyError, OSError, ClipError) as error:
            missed += 1
            reason = error.reason if isinstance(error, ClipError) else "the file is missing"
            echo(f"note: {cache.entry(index).name} has no round trip: {reason}")
            continue
        done += 1
        yield clip


def _spread_first(indices: Sequence[int], wanted: int) -> list[int]:
    """Return ``indices`` with ``wanted`` evenly spread indices first."""
    order = sorted(range(len(indices)), key=lambda place: (place * wanted % len(indices) >= wanted, place))
    return [indices[place] for place in order]


def _read_clip(config: AnyConfig, cache: LatentCache, index: int, paths: Mapping[str, Path]) -> RoundtripClip:
    """Read a cached clip's file. Raise ``KeyError``, ``OSError`` or :class:`ClipError` where it is gone or is not what
    was prepared.
    """
    entry = cache.entry(index)
    path = paths[entry.name]
    file_size(path)  # refuses pipes and devices, which hashing would read forever
    content = hash_file(path)
    data = at_bucket_size(config.data, cache.bucket(index))
    if clip_key(content, data, cache.model_hashes["vae"], cache.image_variants) != cache.clip_of(index):
        raise ClipError("it is not the file that was prepared")
    clip = read_clip(path, data, content)
    return RoundtripClip(entry.name, clip.frames.float() / 255, clip.source, clip.source_at, entry.mean)


def _try_scales(sampler: Sampler, clips: Sequence[RoundtripClip], scaling_factor: float) -> dict[str, float]:
    """Return the median PSNR of the clips' first frame, which has a latent frame of its own, by the factor on its
    latents.
    """
    found: dict[str, list[float]] = {}
    for clip in clips:
        first = clip.scaled_latents(scaling_factor)[:1]
        for factor in (1.0, *FACTORS):
            frames = sampler.decode(factor * first)
            found.setdefault(f"{factor:g}", []).append(round(frames_psnr(frames, clip.frames[: len(frames)]), 3))
    return {factor: median(values) for factor, values in found.items()}


def _try_decoders(
    sampler: Sampler, clips: Sequence[RoundtripClip], scaling_factor: float
) -> dict[str, DecodingVariant]:
    """Compare each precision, and tiling, with fp32 without tiles on the first clip, frame by frame."""
    if not clips:
        return {}
    latents = clips[0].scaled_latents(scaling_factor)[:TRIAL_FRAMES]
    reference_decoder = ("fp32", False)
    chosen = (dtype_name(sampler.vae.dtype), bool(sampler.vae.use_tiling))
    # Half precision is slow on a CPU, fp16 most of all.
    decoders = [("bf16", False), *([("fp16", False)] if sampler.device.type == "cuda" else []), ("fp32", True)]
    if chosen not in (*decoders, reference_decoder):
        decoders.append(chosen)
    with sampler.decoding_in(*reference_decoder):
        reference = sampler.decode(latents)
    trials = {}
    for dtype, tiling in decoders:
        is_chosen = (dtype, tiling) == chosen
        try:
            with sampler.decoding_in(dtype, tiling):
                frames = sampler.decode(latents)
        except RuntimeError as error:  # the device has no kernel for this precision
            trial = DecodingVariant(is_chosen, failed=str(error).splitlines()[0][:200])
        else:
            trial = DecodingVariant(
                is_chosen, round(frames_psnr(frames, reference), 3), float(frames.isfinite().float().mean())
            )
        trials[decoder_name(dtype, tiling)] = trial
    return trials
