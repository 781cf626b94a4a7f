"""Forecast the size of a run: clips, prompts of a validation, and the disk space of its checkpoints."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from cogflow.artifacts.run_layout import RunLayout
from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.data.clip_index import read_index
from cogflow.data.clip_usage import left_out_line
from cogflow.data.holdout import resolve_holdout, split_holdout
from cogflow.data.latent_cache import LatentCache
from cogflow.errors import DataError
from cogflow.sampling.prompts import FROM_DATA, SHAPES_PROMPTS, read_prompts
from cogflow.training.gpu_layout import GpuLayout
from cogflow.training.transformer_size import TransformerSize


@dataclass(frozen=True)
class Clips:
    """Numbers of clips. ``training``: without the held-out clips, ``None`` if unknown. ``source``: origin of the
    numbers.

    ``left_out``: a line on the clips that could not be prepared, empty without such clips.
    """

    training: int | None
    holdout: int
    source: str
    size_differs: bool = False
    left_out: str = ""


def clips(config: Config[TrainStage], run: Path) -> Clips:
    """Return the clips of the cache, before stage=prepare those of the list of the folder.

    Each clip in the list is assumed to be readable and to become one clip.
    """
    data = config.data
    if (RunLayout(run).cache / "index.json").is_file():
        try:
            cache = LatentCache(RunLayout(run).cache)
            return Clips(
                len(cache.train),
                len(cache.holdout),
                f"prepared in {cache.folder}",
                bool(cache.mismatches(data)),
                left_out_line(cache.folder),
            )
        except DataError as error:
            return Clips(None, data.holdout or 0, error.message)
    if data.name == "shapes" and not (data.path and Path(data.path).expanduser().is_dir()):
        return _divided(data.clips, data.holdout, f"data.clips={data.clips}, to be drawn")
    if data.path is None:
        return Clips(None, data.holdout or 0, "data.path is not given")
    try:
        return _divided(len(read_index(Path(data.path).expanduser())), data.holdout, f"listed in {data.path}")
    except DataError as error:
        return Clips(None, data.holdout or 0, error.message)


def _divided(count: int, holdout: int | None, source: str) -> Clips:
    wanted = resolve_holdout(holdout, count, f"clips are {source}")
    train, held = split_holdout([str(position) for position in range(count)], wanted)
    return Clips(len(train), len(held), source)


def prompts(config: Config[TrainStage]) -> tuple[int, str]:
    """Return the number of prompts that a validation samples, and their source."""
    if config.sampling.prompts is not None:
        try:
            return len(read_prompts(Path(config.sampling.prompts).expanduser())), config.sampling.prompts
        except DataError as error:
            return FROM_DATA, f"{FROM_DATA} assumed: {error.message}"
    if config.data.name == "shapes":
        return len(SHAPES_PROMPTS), "the prompts of drawn clips"
    return FROM_DATA, "the captions of the first held-out clips"


@dataclass(frozen=True)
class Disk:
    """Disk space in bytes. ``most``: largest number of checkpoints at once, including the one being written. ``alone``:
    number of folders that hold weights only."""

    deepspeed: float
    weights: float
    averages: float
    most: int
    alone: int
    free: float | None

    @property
    def checkpoint(self) -> float:
        return self.deepspeed + self.weights + self.averages

    @property
    def needed(self) -> float:
        return self.most * self.checkpoint + self.alone * self.weights

    @property
    def full(self) -> bool:
        """True if the free space is known and too small."""
        return self.free is not None and self.needed > self.free


def disk(config: Config[TrainStage], shape: TransformerSize, layout: GpuLayout, run: Path) -> Disk:
    """Return the disk space that a run needs and the space that is free for it."""
    deepspeed, weights, averages = checkpoint(shape, layout)
    return Disk(
        deepspeed=deepspeed,
        weights=weights,
        averages=averages,
        most=at_once(config.stage),
        alone=weights_alone(config.stage),
        free=free(run),
    )


def checkpoint(shape: TransformerSize, layout: GpuLayout) -> tuple[float, float, float]:
    """Return the bytes of DeepSpeed's states, of the weights and of the EMA."""
    weights = float(shape.parameters * layout.bytes)
    half = layout.bytes < 4
    if layout.zero_stage == 0:
        states = (12 if half else 8) * shape.trained + weights
    else:
        # ZeRO also keeps an fp32 master copy of the weights. ZeRO-3 stores no other copy.
        states = 12 * shape.trained + (weights if layout.zero_stage < 3 else 0)
    return states, weights, 4.0 * shape.parameters if layout.ema else 0.0


def at_once(stage: TrainStage) -> int:
    """Return the largest number of checkpoints on the disk. A new checkpoint is complete before an old one is
    deleted."""
    written = max(1, -(-stage.steps // stage.save_every)) if stage.save_every else 1
    sharp = 1 if stage.sample_every else 0
    kept = stage.steps // math.lcm(stage.keep_every, stage.save_every) if stage.keep_every and stage.save_every else 0
    return min(written, stage.keep_last + stage.keep_best + sharp + 1 + kept)


def weights_alone(stage: TrainStage) -> int:
    """Return the number of weight folders at the end of the run. cogflow deletes none of them."""
    return stage.steps // stage.weights_every if stage.weights_every else 0


def free(folder: Path) -> float | None:
    """Return the free bytes at ``folder``, which need not exist yet; ``None`` if they are unknown."""
    there = folder.expanduser().absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        return float(shutil.disk_usage(there).free)
    except OSError:
        return None
