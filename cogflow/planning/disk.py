"""What a run writes: the size of one checkpoint, how many lie there at once, and the space that is free for them."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from cogflow.config.train_settings import TrainStage
from cogflow.planning.gpu_layout import GpuLayout
from cogflow.planning.transformer_size import TransformerSize


@dataclass(frozen=True)
class Disk:
    """Bytes. ``most``: checkpoints at once, the one that is being written included. ``alone``: folders of weights for an export."""

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
        """Whether it is known that they do not fit."""
        return self.free is not None and self.needed > self.free


def checkpoint(shape: TransformerSize, setting: GpuLayout) -> tuple[float, float, float]:
    """Bytes of DeepSpeed's states, of the weights beside them and of the averages."""
    weights = float(shape.parameters * setting.bytes)
    half = setting.bytes < 4
    if setting.zero_stage == 0:
        states = (12 if half else 8) * shape.trained + weights
    else:
        # ZeRO keeps a master copy of fp32 weights, too; ZeRO-3 has the weights in nothing but these.
        states = 12 * shape.trained + (weights if setting.zero_stage < 3 else 0)
    return states, weights, 4.0 * shape.parameters if setting.ema else 0.0


def at_once(stage: TrainStage) -> int:
    """Checkpoints on the disk at the worst moment: a new one is whole before an old one goes."""
    written = max(1, -(-stage.steps // stage.save_every)) if stage.save_every else 1
    sharp = 1 if stage.sample_every else 0
    kept = stage.steps // math.lcm(stage.keep_every, stage.save_every) if stage.keep_every and stage.save_every else 0
    return min(written, stage.keep_last + stage.keep_best + sharp + 1 + kept)


def weights_alone(stage: TrainStage) -> int:
    """Folders of weights at the end: none of them is deleted."""
    return stage.steps // stage.weights_every if stage.weights_every else 0


def free(folder: Path) -> float | None:
    """Bytes free where ``folder`` is or will be; ``None`` where that cannot be told."""
    there = folder.expanduser().absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        return float(shutil.disk_usage(there).free)
    except OSError:
        return None
