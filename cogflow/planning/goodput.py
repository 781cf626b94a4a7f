"""Forecast the share of a run that its training steps get, and the interval between saves that costs least.

First order, as J. W. Young (A first order approximation to the optimum checkpoint interval, Comm. ACM 17, 1974) and
J. T. Daly (A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer
Systems 22, 2006) begin: interruptions come at random at a constant rate, each throws away half of what lies between
two saves, and none comes while the run restarts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cogflow.training.gpu_layout import GpuLayout
from cogflow.training.transformer_size import TransformerSize

WEEK = 7 * 86400.0


@dataclass(frozen=True)
class Goodput:
    """Times of one run. In seconds: ``step``, ``save``, ``validation`` (one, beside decoding), ``restart``, and
    ``mtbf``, the mean time between two interruptions of the whole run. ``every`` and ``sampled``: steps from one save
    and one validation to the next; 0: none."""

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
        """Steps that an interruption may throw away at most."""
        return min(self.every or self.steps, self.steps)

    @property
    def validating(self) -> float:
        """Seconds of validations for each step."""
        return self.validation / min(self.sampled, self.steps) if self.sampled else 0.0

    @property
    def undisturbed(self) -> float:
        """Seconds for each step, with its share of saves and validations."""
        return self.step + self.validating + self.save / self.between

    @property
    def lost(self) -> float:
        """Seconds that one interruption costs: half of what lies between two saves, and the restart."""
        return self.between * self.undisturbed / 2 + self.restart

    @property
    def lost_share(self) -> float:
        """Share of the run that interruptions cost; 1: the run makes no progress."""
        return min(1.0, self.lost / self.mtbf)

    @property
    def share(self) -> float:
        """Share of the run that training steps get: its goodput."""
        return self.step / self.undisturbed * (1 - self.lost_share)

    @property
    def saving_share(self) -> float:
        return self.save / self.between / self.undisturbed * (1 - self.lost_share)

    @property
    def validation_share(self) -> float:
        return self.validating / self.undisturbed * (1 - self.lost_share)

    @property
    def seconds(self) -> float:
        """Seconds of the whole run; infinite if interruptions cost more time than passes between them."""
        return self.steps * self.undisturbed / (1 - self.lost_share) if self.lost_share < 1 else math.inf

    @property
    def interruptions(self) -> float:
        """Interruptions expected in the whole run."""
        return self.seconds / self.mtbf

    @property
    def a_week(self) -> float:
        """Interruptions expected in a week."""
        return WEEK / self.mtbf

    @property
    def best_seconds(self) -> float:
        """Seconds between two saves at which saves and lost steps together cost least: sqrt(2 save mtbf). The
        formula holds while a save takes far less than ``mtbf``."""
        return math.sqrt(2 * self.save * self.mtbf)

    @property
    def best_every(self) -> int:
        """Steps between two saves at which saves and lost steps together cost least."""
        return max(1, round(self.best_seconds / (self.step + self.validating)))


def save_seconds(shape: TransformerSize, layout: GpuLayout, bytes: float, rate: float) -> float:
    """Return the seconds that saving ``bytes`` takes if each machine writes and reads ``rate`` bytes a second.

    All ranks write the states that ZeRO shards, and rank 0 alone writes the rest. All ranks then hash the checkpoint,
    publish it and read it back. Training waits meanwhile."""
    together = 12.0 * shape.trained if layout.zero_stage > 0 else 0.0
    return ((together + 2 * bytes) / layout.nodes + bytes - together) / rate
