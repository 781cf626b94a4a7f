"""Rung 2: clips through the VAE and back, by the very path that training and sampling use. It is the ceiling of what a sample can reach."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cogflow.config.schema import AnyConfig
from cogflow.data.buckets import sized
from cogflow.data.cache import LatentCache
from cogflow.data.clip_index import read_index
from cogflow.data.clips import ClipError, read_clip
from cogflow.data.encode import clip_key
from cogflow.errors import CogflowError
from cogflow.files.hashing import hash_file
from cogflow.ladder import crops, store
from cogflow.models.loading import dtype_name
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.sampling.sampler import Sampler, decoder
from cogflow.sharpness.metrics import measure as panel_of

Panel = dict[str, float]
SCALED = 2  # clips whose first frame is decoded at other scales, too
VARIED = 3  # latent frames of the first clip that are decoded in other precisions, too; an odd number, as a clip has
FACTORS = (0.5, 0.607, 0.8, 1.25, 1.6465, 2.0)
"""Scales at which latents are tried beside their own: 0.607 and 1.6465 are 0.7 over 1.15258426 and back, the rest are about it."""


@dataclass(frozen=True)
class Read:
    """One clip: its frames as the loader gives them (0..1), a few source frames and their places, and its cached latents, not scaled."""

    name: str
    frames: torch.Tensor
    source: torch.Tensor
    source_at: tuple[int, ...]
    mean: torch.Tensor


def measure(
    folder: Path, config: AnyConfig, cache: LatentCache, sampler: Sampler, scaling_factor: float
) -> dict[str, Panel]:
    """Decode cached latents times ``scaling_factor`` (training's own) with ``sampler``; the panel of each decoded clip by its name.

    ``folder`` is the run's. Every rank calls it and gets the same; rank 0 works. ``config.sampling.roundtrip_clips`` clips, evenly spread
    over the prepared ones; 0 turns it off (empty result, as when no clip file is left). Writes rung 2 of ``folder/ladder.json`` with
    PSNR per clip and the variants of precision and tiling; a resumed run whose ladder has it already for the same cache, VAE and factor
    reads it from there. Call it once before the first validation.
    """
    return ranks.broadcast(_measure(folder, config, cache, sampler, scaling_factor) if ranks.is_main() else None)


def _measure(
    folder: Path, config: AnyConfig, cache: LatentCache, sampler: Sampler, scaling_factor: float
) -> dict[str, Panel]:
    identity = {
        "cache": cache.fingerprint, "vae": cache.model_hashes.get("vae"), "scaling_factor": scaling_factor,
        "vae_scaling_factor": float(sampler.vae.config.scaling_factor), "dtype": dtype_name(sampler.vae.dtype),
        "tiling": bool(sampler.vae.use_tiling), "device": sampler.device.type, "wanted": config.sampling.roundtrip_clips,
    }  # fmt: skip
    known = store.read(folder)["rungs"].get("2")
    if known is not None and known["facts"].get("identity") == identity:
        return dict(known["panels"])
    panels: dict[str, Panel] = {}
    clips: dict[str, Panel] = {}
    psnrs: dict[str, float] = {}
    varied: list[tuple[Read, torch.Tensor]] = []
    shown: dict[str, crops.Rungs] = {}
    for read in _read(folder, config, cache):
        latents = scaling_factor * read.mean.float().transpose(0, 1)
        decoded = sampler.decode(latents)
        clips[read.name], panels[read.name] = panel_of(read.frames), panel_of(decoded)
        psnrs[read.name] = psnr(decoded, read.frames)
        at = list(read.source_at)
        shown[read.name] = {"source": read.source, "clip": read.frames[at], "roundtrip": decoded[at]}
        if len(varied) < SCALED:
            varied.append((read, latents))
    facts: dict[str, Any] = {
        "identity": identity,
        "psnr": psnrs,
        "clips": clips,
        "non_finite": [n for n, p in panels.items() if p["finite"] < 1],
    }
    facts["scales"] = _scales(sampler, varied)
    store.put(folder, 2, panels, facts, variants=_variants(sampler, varied))
    if shown:
        worst = min(psnrs, key=lambda name: psnrs[name] if math.isfinite(psnrs[name]) else -1.0)
        crops.save(folder / "ladder" / "clips.png", {worst: shown[worst]})
    sampler.finish()
    return panels


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """In dB, of frames in 0..1, at most 100; 0 for other shapes; what is not finite counts as the largest error."""
    if one.shape != other.shape:
        return 0.0
    error = float(torch.where(one.isfinite(), one - other, 1.0).double().square().mean())
    return 100.0 if error == 0 else round(min(100.0, -10 * math.log10(error)), 3)


def clips_folder(folder: Path, config: AnyConfig) -> Path:
    """Where the clips of the run in ``folder`` lie."""
    return Path(config.data.path).expanduser() if config.data.path is not None else folder / "data"


def _read(folder: Path, config: AnyConfig, cache: LatentCache) -> Iterator[Read]:
    """Clips evenly spread over the cache. One whose file is gone or another by now is passed over with a line, and the next one taken."""
    # With buckets the clips of the samples' size, since samples are held against them; of all sizes where there is none.
    size = f"{config.data.frames}x{config.data.height}x{config.data.width}"
    places = [index for index in range(len(cache)) if cache.bucket(index) in (None, size)] or list(range(len(cache)))
    wanted = min(config.sampling.roundtrip_clips, len(places))
    if not wanted:
        return
    try:
        paths = {entry.name: entry.path for entry in read_index(clips_folder(folder, config))}
    except CogflowError as error:
        echo(f"note: no round trip of the clips: {error.message.splitlines()[0]}")
        return
    order = sorted(range(len(places)), key=lambda place: (place * wanted % len(places) >= wanted, place))
    done, missed = 0, 0
    for index in (places[place] for place in order):
        if done == wanted or missed == 2 * wanted:
            break
        entry = cache.entry(index)
        try:
            path = paths[entry.name]
            content = hash_file(path)
            data = sized(config.data, cache.bucket(index))
            if clip_key(content, data, cache.model_hashes["vae"], cache.image_variants) != cache.clip_of(index):
                raise ClipError("it is not the file that was prepared")
            clip = read_clip(path, data, content)
        except (KeyError, OSError, ClipError) as error:
            missed += 1
            echo(
                f"note: {entry.name} has no round trip: {error.reason if isinstance(error, ClipError) else 'its file is gone'}"
            )
            continue
        done += 1
        yield Read(entry.name, clip.frames.float() / 255, clip.source, clip.source_at, entry.mean)


def _variants(sampler: Sampler, varied: list[tuple[Read, torch.Tensor]]) -> dict[str, Any]:
    """Each precision, and tiling, against fp32 without tiles, frame by frame: PSNR and the share of finite values."""
    if not varied:
        return {}
    found: dict[str, Any] = {}
    settled, plain = sampler.vae, decoder(sampler.loaded_vae, "fp32", tiling=False)
    chosen = (dtype_name(settled.dtype), bool(settled.use_tiling))
    # Half precision is slow on a CPU, fp16 most of all.
    ways = [("bf16", False), *([("fp16", False)] if sampler.device.type == "cuda" else []), ("fp32", True)]
    try:
        sampler.vae = plain
        latents = varied[0][1][:VARIED]
        reference = sampler.decode(latents)
        for dtype, tiling in ways + ([chosen] if chosen not in (*ways, ("fp32", False)) else []):
            sampler.vae = decoder(sampler.loaded_vae, dtype, tiling)
            try:
                frames = sampler.decode(latents)
            except RuntimeError as error:  # a precision that this device has no kernel for
                found[variant_name(dtype, tiling)] = {
                    "chosen": (dtype, tiling) == chosen,
                    "failed": str(error).splitlines()[0][:200],
                }
                continue
            found[variant_name(dtype, tiling)] = {
                "chosen": (dtype, tiling) == chosen,
                "psnr": psnr(frames, reference),
                "finite": float(frames.isfinite().float().mean()),
            }
    finally:
        if sampler.vae is not settled:
            sampler.vae.to("cpu")
        sampler.vae = settled
    return found


def variant_name(dtype: str, tiling: bool) -> str:
    return dtype + (", tiled" if tiling else "")


def _scales(sampler: Sampler, varied: list[tuple[Read, torch.Tensor]]) -> dict[str, float]:
    """Median PSNR of a clip's first frame, which has a latent of its own, decoded at several scales; ``"1"`` is the one it has."""
    found: dict[str, list[float]] = {}
    for read, latents in varied:
        for factor in (1.0, *FACTORS):
            frames = sampler.decode(factor * latents[:1])
            found.setdefault(f"{factor:g}", []).append(psnr(frames, read.frames[: len(frames)]))
    return {factor: median(values) for factor, values in found.items()}
