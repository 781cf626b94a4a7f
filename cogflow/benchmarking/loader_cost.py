"""stage.what=loader: batches made of a latent cache on the disk as training makes them, by part, beside a training step."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from cogflow.benchmarking.step import MemoryWatch, make_trainer, speed_of, training
from cogflow.benchmarking.tables import Table
from cogflow.benchmarking.turns import Turns
from cogflow.config.schema import BenchmarkStage, Config, DataConfig
from cogflow.data import cache, cache_shards
from cogflow.data.cache import LatentCache
from cogflow.data.clips import SETTINGS
from cogflow.data.encode import CLIPS, TEXTS
from cogflow.files.atomic_write import write_json
from cogflow.models import loading as components
from cogflow.models.inputs import Inputs, takes_image
from cogflow.planning import transformer_size
from cogflow.planning.plan import plan
from cogflow.runtime import ranks
from cogflow.runtime.progress import progress
from cogflow.training.batch import Batch, training_batch
from cogflow.training.loader import Loader

HELD = 64  # clips in the cache, in shards of SHARD: more than fit into a processor's caches at the size of CogVideoX
SHARD = 16
BATCHES = 16  # of a turn
WHOLE = "a batch"


def loading(config: Config[BenchmarkStage], stage: BenchmarkStage, folder: Path) -> tuple[dict[str, Any], Table]:
    """``stage.repeats`` turns after one that does not count, each of 16 batches of ``stage.batch_size`` clips at the size of ``data``."""
    device = ranks.device()
    place = (Path(stage.folder).expanduser() if stage.folder else folder / "benchmark") / "loader"
    described, _ = transformer_size.config_of(config.model)
    inputs = Inputs.of(described, {"scaling_factor": 0.7})
    dtype = components.resolve_dtype(config.model, device)
    drawn_cache(place, config.data, described, dtype)
    clips = LatentCache(place)
    turns: list[dict[str, float]] = []
    with progress(1 + stage.repeats, "turns") as bar:
        for turn in range(1 + stage.repeats):
            found = _turn(clips, inputs, stage.batch_size, turn, device)
            turns += [found] if turn else []
            bar.advance()
    seconds = {part: [one[part] for one in turns] for part in turns[0]}
    size = _bytes(_batch(clips, inputs, stage.batch_size, 0))
    del clips
    if not stage.keep:
        shutil.rmtree(place)
    whole = median(seconds[WHOLE])
    step, source = _step(config, stage, device, dtype)
    data = config.data
    line = f"loader: {1 / whole:.3g} batches of {stage.batch_size} x {data.frames}x{data.height}x{data.width} a second "
    line += f"({stage.batch_size / whole:.3g} clips, {size / whole / 1e6:.3g} MB); "
    line += f"a batch of {1000 * whole:.3g} ms is {whole / step:.2%} of {source}"
    cells: list[list[Any]] = [
        [part, 1000 * median(times), 1000 * min(times), 1000 * max(times), median(times) / whole, median(times) / step]
        for part, times in seconds.items()
    ]
    columns = ["part", "ms a batch", "lowest", "highest", "share of the batch", "share of a step"]
    results = {
        "summary": line,
        "seconds": seconds,
        "bytes": size,
        "step": step,
        "step source": source,
        "share": whole / step,
    }
    return results, (columns, cells)


def _turn(clips: LatentCache, inputs: Inputs, batch_size: int, turn: int, device: torch.device) -> dict[str, float]:
    """Seconds of a batch, whole and by part, each on one thread over other clips than the turn before."""
    start = turn * BATCHES
    latents = clips.entry(0).mean.shape

    def mean(work: Callable[[int], Any]) -> float:
        began = time.perf_counter()
        for number in range(start, start + BATCHES):
            work(number)
        return (time.perf_counter() - began) / BATCHES

    def read(number: int) -> None:
        for position in _chosen(clips, batch_size, number):
            one = clips.entry(position)
            # Mapped tensors are read when they are touched.
            for tensor in (one.mean, one.logvar, one.embeds):
                tensor.clone()

    def normal(number: int) -> torch.Tensor:
        rng = np.random.default_rng([number])
        return torch.stack(
            [torch.from_numpy(rng.standard_normal(tuple(latents), dtype=np.float32)) for _ in range(batch_size)]
        )

    found = {WHOLE: mean(lambda number: _batch(clips, inputs, batch_size, number))}
    with Loader(lambda step, micro: _batch(clips, inputs, batch_size, step), 1, device) as loader:

        def take(number: int) -> None:
            loader.take(number, 0)
            loader.go_on()

        found["of the loader, to the device"] = mean(take)
    found["reading"] = mean(read)
    found["noise, drawn once"] = mean(normal)
    ready = _batch(clips, inputs, batch_size, start)
    noise = normal(start)
    deviation = torch.full_like(noise, -6.0)
    found["posterior, without its noise"] = mean(
        lambda _: noise + torch.exp(0.5 * deviation.clamp(-30.0, 20.0)) * noise
    )
    if device.type == "cuda":
        found["pinning"] = mean(lambda _: ready.pinned())
    return found


def _chosen(clips: LatentCache, batch_size: int, number: int) -> list[int]:
    # Seven is prime to the number of clips: neighbours in a batch lie in different shards, as in a shuffled epoch.
    return [clips.train[7 * (number * batch_size + slot) % len(clips.train)] for slot in range(batch_size)]


def _batch(clips: LatentCache, inputs: Inputs, batch_size: int, number: int) -> Batch:
    return training_batch(clips, _chosen(clips, batch_size, number), (0, number), 0, inputs=inputs, text_dropout=0.0)


def _bytes(batch: Batch) -> int:
    """Of all tensors of a batch."""
    held = [getattr(batch, field.name) for field in fields(batch)]
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def _step(
    config: Config[BenchmarkStage], stage: BenchmarkStage, device: torch.device, dtype: torch.dtype
) -> tuple[float, str]:
    """Seconds of a training step of the model, and in words where they come from: measured where the model fits, else planned for a GPU."""
    asked = training(config, stage, 1 + 2 * stage.steps)
    if device.type == "cuda" or config.model.name == "tiny":
        trainer = make_trainer(asked, device, dtype, MemoryWatch(device))
        with progress(2, "training") as bar:
            turns = Turns(stage.steps, device, bar.advance)
            trainer.run(0, turns.hooks(lambda *_: None))
        if (speed := speed_of(turns.ours[1:], stage.batch_size)) is not None:
            return speed.median, f"a training step of {speed.median:.3g} s"
    foreseen = plan(asked)
    return (
        foreseen.pace.step,
        f"a training step of {foreseen.pace.step:.3g} s, planned for a GPU of {foreseen.device.tflops:.3g} TFLOP/s",
    )


def drawn_cache(place: Path, data: DataConfig, described: dict[str, Any], dtype: torch.dtype) -> None:
    """A prepared folder of :data:`HELD` clips at the size of ``data`` for the transformer ``described``, with drawn values."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    per_latent = int(described.get("temporal_compression_ratio") or 4)
    latents = (16, (data.frames - 1) // per_latent + 1, data.height // 8, data.width // 8)
    text = (int(described["max_text_seq_length"]), int(described["text_embed_dim"]))
    variants = data.image_variants if takes_image(described) else 0
    names = [str(number) for number in range(HELD)]
    with cache_shards.ShardWriter(place, CLIPS, SHARD) as clips, cache_shards.ShardWriter(place, TEXTS, SHARD) as texts:
        for name in names:
            tensors = {"mean": torch.randn(latents, generator=generator), "logvar": torch.full(latents, -6.0)}
            for variant in range(variants):
                first = (latents[0], 1, *latents[2:])
                tensors |= {
                    f"image_mean_{variant}": torch.randn(first, generator=generator),
                    f"image_logvar_{variant}": torch.full(first, -6.0),
                }
            clips.add(name, tensors)
            texts.add(name, {"embeds": torch.randn(text, generator=generator).to(dtype)})
        texts.add("empty", {"embeds": torch.zeros(text, dtype=dtype)})
    held_clips, held_texts = cache_shards.scan(place, CLIPS), cache_shards.scan(place, TEXTS)
    entries = [
        {
            "key": name, "name": name, "text": name, "clip": name, "clip_shard": held_clips[name].shard, "caption": name,
            "text_shard": held_texts[name].shard,
        }
        for name in names
    ]  # fmt: skip
    settings = {name: getattr(replace(data, buckets=[]), name) for name in SETTINGS}
    index = {
        "version": cache.VERSION, "plan": "", "fingerprint": "drawn", "settings": settings | {"image_variants": variants}, "models": {},
        "empty": {"caption": "empty", "text_shard": held_texts["empty"].shard}, "train": list(range(HELD)), "holdout": [],
        "entries": entries,
    }  # fmt: skip
    write_json(place / cache.INDEX, json.loads(json.dumps(index)))
