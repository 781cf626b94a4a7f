"""stage.what=loader: time the parts of loading a batch from a latent cache, and compare them with a training step."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from cogflow.benchmarking.results import BenchmarkResult, Cell
from cogflow.benchmarking.step import MemoryLog, make_trainer, train_config
from cogflow.benchmarking.timed_turns import TimedTurns, step_times
from cogflow.config.benchmark_settings import BenchmarkStage
from cogflow.config.config import Config
from cogflow.config.data_section import DataConfig
from cogflow.data.clips import CLIP_SETTINGS
from cogflow.data.latent_cache import CLIPS, TEXTS, LatentCache, ShardWriter, scan_shards
from cogflow.files.record_io import write_record
from cogflow.models import loading as components
from cogflow.models.transformer_inputs import TransformerInputs, TransformerSettings
from cogflow.planning.plan import plan
from cogflow.records.cache_records import CacheCounts, CacheEntry, CacheIndex, CacheSettings, CaptionEntry
from cogflow.runtime import ranks
from cogflow.runtime.progress import progress
from cogflow.training import transformer_size
from cogflow.training.batch import Batch, Loader, training_batch

CACHED_CLIPS = 64
"""Clips in the cache. At the size of CogVideoX they do not fit into a processor's caches."""
SHARD_CLIPS = 16
BATCHES = 16
"""Batches of a turn."""
WHOLE = "a batch"
COLUMNS = ("part", "ms a batch", "lowest", "highest", "share of the batch", "share of a step")


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a training step, and a phrase that describes the source of the number."""

    seconds: float
    source: str


def measure_loading(config: Config[BenchmarkStage], folder: Path) -> BenchmarkResult:
    """Load ``stage.repeats`` turns of 16 batches of ``stage.batch_size`` clips at the size of ``data``, after one
    warm-up turn."""
    stage, data = config.stage, config.data
    device = ranks.device()
    place = (Path(stage.folder).expanduser() if stage.folder else folder / "benchmark") / "loader"
    settings = transformer_size.description_of(config.model).settings
    dtype = components.resolve_dtype(config.model, device)
    write_random_cache(place, data, settings, dtype)
    batches = _Batches(LatentCache(place), TransformerInputs.of(settings, scaling_factor=0.7), stage.batch_size)
    turns: list[dict[str, float]] = []
    with progress(1 + stage.repeats, "turns") as bar:
        for turn in range(1 + stage.repeats):
            found = _turn(batches, turn, device)
            turns += [found] if turn else []
            bar.advance()
    seconds = {part: [spent[part] for spent in turns] for part in turns[0]}
    size = _bytes(batches.make(0))
    del batches
    if not stage.keep:
        shutil.rmtree(place)
    whole = median(seconds[WHOLE])
    step = _step_seconds(config, device, dtype)
    clips = f"{stage.batch_size} x {data.frames}x{data.height}x{data.width}"
    rate = f"{1 / whole:.3g} batches of {clips} a second"
    rate += f" ({stage.batch_size / whole:.3g} clips, {size / whole / 1e6:.3g} MB)"
    rows: list[list[Cell]] = [
        [
            part,
            *(1000 * value for value in (median(times), min(times), max(times))),
            median(times) / whole,
            median(times) / step.seconds,
        ]
        for part, times in seconds.items()
    ]
    return BenchmarkResult(
        summary=f"loader: {rate}; a batch of {1000 * whole:.3g} ms is {whole / step.seconds:.2%} of {step.source}",
        columns=COLUMNS,
        rows=rows,
        details={
            "seconds": seconds,
            "bytes": size,
            "step": step.seconds,
            "step_source": step.source,
            "share": whole / step.seconds,
        },
    )


class _Batches:
    """Numbered batches. Neighbouring clips of a batch are in different shards, as in a shuffled epoch."""

    def __init__(self, clips: LatentCache, inputs: TransformerInputs, batch_size: int) -> None:
        self.clips, self.inputs, self.batch_size = clips, inputs, batch_size

    def chosen(self, number: int) -> list[int]:
        train = self.clips.train
        # 7 and the number of clips have no common divisor.
        return [train[7 * (number * self.batch_size + slot) % len(train)] for slot in range(self.batch_size)]

    def make(self, number: int) -> Batch:
        return training_batch(self.clips, self.chosen(number), (0, number), 0, inputs=self.inputs, text_dropout=0.0)

    def read(self, number: int) -> None:
        """Read the tensors of a batch. Mapped tensors are read from the disk when they are touched."""
        for position in self.chosen(number):
            clip = self.clips.entry(position)
            for tensor in (clip.mean, clip.logvar, clip.embeds):
                tensor.clone()

    def noise(self, number: int) -> torch.Tensor:
        """Draw the noise of a batch once."""
        shape = tuple(self.clips.entry(0).mean.shape)
        rng = np.random.default_rng([number])
        drawn = [torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for _ in range(self.batch_size)]
        return torch.stack(drawn)


def _turn(batches: _Batches, turn: int, device: torch.device) -> dict[str, float]:
    """Return the seconds of a batch and of its parts. Each is measured on one thread, with other clips than in the last
    turn."""
    start = turn * BATCHES

    def mean_seconds(work: Callable[[int], Any]) -> float:
        began = time.perf_counter()
        for number in range(start, start + BATCHES):
            work(number)
        return (time.perf_counter() - began) / BATCHES

    found = {WHOLE: mean_seconds(batches.make)}
    with Loader(lambda step, micro: batches.make(step), 1, device) as loader:

        def take(number: int) -> None:
            loader.take(number, 0)
            loader.start_prefetch()

        found["of the loader, to the device"] = mean_seconds(take)
    found["reading"] = mean_seconds(batches.read)
    found["noise, drawn once"] = mean_seconds(batches.noise)
    ready, noise = batches.make(start), batches.noise(start)
    log_variance = torch.full_like(noise, -6.0)
    found["posterior, without its noise"] = mean_seconds(
        lambda _: noise + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
    )
    if device.type == "cuda":
        found["pinning"] = mean_seconds(lambda _: ready.pinned())
    return found


def _bytes(batch: Batch) -> int:
    """Return the bytes of all tensors of a batch."""
    tensors = [getattr(batch, field.name) for field in fields(batch)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _step_seconds(config: Config[BenchmarkStage], device: torch.device, dtype: torch.dtype) -> StepSeconds:
    """Return the seconds of a training step: measured if the model fits, else forecast for a GPU."""
    stage = config.stage
    asked = train_config(config, 1 + 2 * stage.steps)
    if device.type == "cuda" or config.model.name == "tiny":
        trainer = make_trainer(asked, device, dtype, MemoryLog(device))
        with progress(2, "training") as bar:
            turns = TimedTurns(stage.steps, device, bar.advance)
            trainer.callbacks.items.append(turns)
            trainer.run()
        if (times := step_times(turns.ours[1:], stage.batch_size)) is not None:
            return StepSeconds(times.median, f"a training step of {times.median:.3g} s")
    planned = plan(asked)
    seconds, rate = planned.pace.step, planned.device.tflops
    return StepSeconds(seconds, f"a training step of {seconds:.3g} s, forecast for a GPU of {rate:.3g} TFLOP/s")


def write_random_cache(place: Path, data: DataConfig, transformer: TransformerSettings, dtype: torch.dtype) -> None:
    """Write a prepared folder of :data:`CACHED_CLIPS` random clips at the size of ``data``.

    ``dtype``: dtype of the embeddings.
    """
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    latents = (16, (data.frames - 1) // transformer.temporal_compression_ratio + 1, data.height // 8, data.width // 8)
    text = (transformer.max_text_seq_length, transformer.text_embed_dim)
    variants = data.image_variants if transformer.takes_image else 0
    names = [str(number) for number in range(CACHED_CLIPS)]

    def moments(kind: str, size: tuple[int, ...]) -> dict[str, torch.Tensor]:
        mean, logvar = kind.format("mean"), kind.format("logvar")
        return {mean: torch.randn(size, generator=generator), logvar: torch.full(size, -6.0)}

    with (
        ShardWriter(place, CLIPS, SHARD_CLIPS) as clips,
        ShardWriter(place, TEXTS, SHARD_CLIPS) as texts,
    ):
        for name in names:
            tensors = moments("{}", latents)
            for variant in range(variants):
                tensors |= moments(f"image_{{}}_{variant}", (latents[0], 1, *latents[2:]))
            clips.add(name, tensors)
            texts.add(name, {"embeds": torch.randn(text, generator=generator).to(dtype)})
        texts.add("empty", {"embeds": torch.zeros(text, dtype=dtype)})
    stored_clips, stored_texts = scan_shards(place, CLIPS), scan_shards(place, TEXTS)
    entries = [
        CacheEntry(
            key=name,
            name=name,
            text=name,
            clip=name,
            clip_shard=stored_clips[name].shard,
            caption=name,
            text_shard=stored_texts[name].shard,
        )
        for name in names
    ]
    shaping = {name: getattr(data, name) for name in CLIP_SETTINGS}
    index = CacheIndex(
        plan="",
        fingerprint="random",
        settings=CacheSettings(**shaping, max_length=text[0], image_variants=variants),
        models={},
        counts=CacheCounts(unreadable=0, upscaled=0, slower=0),
        empty=CaptionEntry("empty", stored_texts["empty"].shard),
        train=list(range(CACHED_CLIPS)),
        holdout=[],
        entries=entries,
    )
    write_record(place / CacheIndex.file_name, index)
