"""What a run writes: the size of one checkpoint, how many lie there at once, and the space that is free for them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cogflow.planning.setting import Setting
from cogflow.planning.shape import Shape


@dataclass(frozen=True)
class Disk:
    """Bytes. ``most``: checkpoints at once, the one that is being written included."""

    deepspeed: float
    weights: float
    averages: float
    most: int
    free: float | None

    @property
    def checkpoint(self) -> float:
        return self.deepspeed + self.weights + self.averages

    @property
    def needed(self) -> float:
        return self.most * self.checkpoint

    @property
    def full(self) -> bool:
        """Whether it is known that they do not fit."""
        return self.free is not None and self.needed > self.free


def checkpoint(shape: Shape, setting: Setting) -> tuple[float, float, float]:
    """Bytes of DeepSpeed's states, of the weights beside them and of the averages."""
    weights = float(shape.parameters * setting.bytes)
    half = setting.bytes < 4
    if setting.zero_stage == 0:
        states = (12 if half else 8) * shape.trained + weights
    else:
        # ZeRO keeps a master copy of fp32 weights, too; ZeRO-3 has the weights in nothing but these.
        states = 12 * shape.trained + (weights if setting.zero_stage < 3 else 0)
    return states, weights, 4.0 * shape.parameters if setting.ema else 0.0


def at_once(*, steps: int, save_every: int, keep_last: int, keep_best: int, sample_every: int) -> int:
    """Checkpoints on the disk at the worst moment: a new one is whole before an old one goes."""
    written = max(1, -(-steps // save_every)) if save_every else 1
    sharp = 1 if sample_every else 0
    return min(written, keep_last + keep_best + sharp + 1)


def free(folder: Path) -> float | None:
    """Bytes free where ``folder`` is or will be; ``None`` where that cannot be told."""
    there = folder.expanduser().absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        return float(shutil.disk_usage(there).free)
    except OSError:
        return None
