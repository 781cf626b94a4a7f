"""Forecast the goodput of a run (the share of its time spent in training steps) and the cheapest save interval.

The formulas are the first-order approximation of J. W. Young (A first order approximation to the optimum checkpoint
interval, Comm. ACM 17, 1974) and J. T. Daly (A higher order estimate of the optimum checkpoint interval for restart
dumps, Future Generation Computer Systems 22, 2006). Interruptions occur at random at a constant rate. Each one loses
half of the steps between two saves. No interruption occurs during a restart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cogflow.training.gpu_layout import GpuLayout
from cogflow.training.transformer_size import TransformerSize

WEEK = 7 * 86400.0


@dataclass(frozen=True)
class Goodput:
    """Times of one run.

    In seconds: ``step``, ``save``, ``validation`` (one validation without decoding), ``restart``, and ``mtbf``, the
    mean time between two interruptions of the run. ``every``: steps between saves; ``sampled``: steps between
    validations; 0 turns them off.
    """

    steps: int
    step: float
    save: float
    every: int
    validation: float
    sampled: int
    mtbf: float
    restart: float

    @property
    def between(self) -> int:
        """Largest number of steps that one interruption can lose."""
        return min(self.every or self.steps, self.steps)

    @property
    def validating(self) -> float:
        """Seconds of validation per step."""
        return self.validation / min(self.sampled, self.steps) if self.sampled else 0.0

    @property
    def undisturbed(self) -> float:
        """Seconds per step, including its share of saves and validations."""
        return self.step + self.validating + self.save / self.between

    @property
    def lost(self) -> float:
        """Seconds that one interruption costs: half of the time between two saves, and the restart."""
        return self.between * self.undisturbed / 2 + self.restart

    @property
    def lost_share(self) -> float:
        """Share of the run that interruptions cost. With 1 the run makes no progress."""
        return min(1.0, self.lost / self.mtbf)

    @property
    def share(self) -> float:
        """Share of the run that is spent in training steps: its goodput."""
        return self.step / self.undisturbed * (1 - self.lost_share)

    @property
    def saving_share(self) -> float:
        return self.save / self.between / self.undisturbed * (1 - self.lost_share)

    @property
    def validation_share(self) -> float:
        return self.validating / self.undisturbed * (1 - self.lost_share)

    @property
    def seconds(self) -> float:
        """Seconds of the whole run; infinite if an interruption costs more time than passes between two of them."""
        return self.steps * self.undisturbed / (1 - self.lost_share) if self.lost_share < 1 else math.inf

    @property
    def interruptions(self) -> float:
        """Expected number of interruptions in the whole run."""
        return self.seconds / self.mtbf

    @property
    def a_week(self) -> float:
        """Expected number of interruptions in a week."""
        return WEEK / self.mtbf

    @property
    def best_seconds(self) -> float:
        """Save interval in seconds that minimises the cost of saves and lost steps: sqrt(2 save mtbf).

        The formula holds while a save takes far less than ``mtbf``.
        """
        return math.sqrt(2 * self.save * self.mtbf)

    @property
    def best_every(self) -> int:
        """Save interval in steps that minimises the cost of saves and lost steps."""
        return max(1, round(self.best_seconds / (self.step + self.validating)))


def save_seconds(shape: TransformerSize, layout: GpuLayout, bytes: float, rate: float) -> float:
    """Return the seconds that saving ``bytes`` takes if each machine writes and reads ``rate`` bytes per second.

    All ranks write the states that ZeRO shards, and rank 0 alone writes the rest. Then all ranks hash the checkpoint,
    publish it and read it back. Training waits during the save.
    """
    together = 12.0 * shape.trained if layout.zero_stage > 0 else 0.0
    return ((together + 2 * bytes) / layout.nodes + bytes - together) / rate
