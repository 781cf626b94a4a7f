"""A moving average of the weights, in fp32 in host memory, each tensor kept by one rank only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from cogflow import ranks
from cogflow.training.engine import Engine


class EMA:
    """``average = decay * average + (1 - decay) * weight`` after every update. Rank i keeps every world-th tensor.

    With ``warmup`` the decay grows as (1 + n) / (10 + n) in the first updates, so that the average does not stay at the start.
    """

    def __init__(self, engine: Engine, decay: float, *, warmup: bool = True) -> None:
        self.decay, self.warmup = decay, warmup
        self.updates = 0
        self.average = {name: weight.float().cpu().clone() for index, (name, weight) in self._trained(engine) if _mine(index)}

    @staticmethod
    def _trained(engine: Engine) -> Iterator[tuple[int, tuple[str, torch.Tensor]]]:
        parameters = dict(engine.module.named_parameters())
        return enumerate((name, weight) for name, weight in engine.weights() if name in parameters)

    @torch.no_grad()
    def update(self, engine: Engine) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        for index, (name, weight) in self._trained(engine):
            if _mine(index):
                self.average[name].lerp_(weight.float().cpu(), 1.0 - decay)
        self.updates += 1

    def weights(self, engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, fp32 average) on the CPU of every rank, one at a time. Collective."""
        names = [name for name, _ in engine.module.named_parameters()]
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}
        for index, name in enumerate(names):
            value = self.average[name] if _mine(index) else torch.empty(tuple(shapes[name]))
            if ranks.world_size() > 1:
                carried = value.to(ranks.device())
                dist.broadcast(carried, src=index % ranks.world_size())
                value = carried.cpu()
            yield name, value
        yield from ((name, weight) for name, weight in engine.weights() if name not in shapes)

    @contextlib.contextmanager
    def applied(self, engine: Engine) -> Iterator[None]:
        """Have the averages in the module inside the block, and the trained weights back afterwards, bit for bit."""
        kept: dict[str, torch.Tensor] = {}
        parameters = dict(engine.module.named_parameters())
        engine.settle()
        for name, value in self.weights(engine):
            if name not in parameters:
                continue
            with engine.whole([parameters[name]], modifier_rank=0), torch.no_grad():
                kept[name] = parameters[name].detach().cpu().clone()
                parameters[name].copy_(value)
        try:
            yield
        finally:
            engine.settle()
            for name, value in kept.items():
                with engine.whole([parameters[name]], modifier_rank=0), torch.no_grad():
                    parameters[name].copy_(value)

    def load(self, weights: Iterator[tuple[str, torch.Tensor]], updates: int) -> None:
        """Take over saved averages; ``weights`` gives all of them, each rank keeps its own."""
        for name, value in weights:
            if name in self.average:
                self.average[name] = value.float().clone()
        self.updates = updates


def _mine(index: int) -> bool:
    return index % ranks.world_size() == ranks.rank()
