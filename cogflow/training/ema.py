"""Exponential moving average (EMA) of the weights in fp32.

Each rank keeps a part of the tensors, on the device or in host memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from cogflow.runtime import ranks
from cogflow.training.engine import Engine


class EMA:
    """``average = decay * average + (1 - decay) * weight`` after every update.

    Rank i keeps tensors i, i + world size, ... on ``device``.

    With ``warmup`` the decay of update n is at most (1 + n) / (10 + n), so that the average does not stay at the start.
    ``every``: steps between two updates, whose decay is that of so many steps.
    """

    def __init__(
        self, engine: Engine, decay: float, *, warmup: bool = True, every: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self.decay, self.warmup, self.every = decay, warmup, every
        self.updates = 0
        self.average = {
            name: weight.to(device, torch.float32, copy=True)
            for index, (name, weight) in self._trained(engine)
            if _is_mine(index)
        }

    def after_step(self, step: int, engine: Engine) -> None:
        """Update after ``step`` finished steps, where that is due. Collective."""
        if step % self.every == 0:
            self.update(engine)

    @torch.no_grad()
    def update(self, engine: Engine) -> None:
        """Add the present weights to the average. Collective."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        for index, (name, weight) in self._trained(engine):
            if _is_mine(index):
                average = self.average[name]
                average.lerp_(weight.to(average.device, torch.float32), 1.0 - decay**self.every)
        self.updates += 1

    def weights(self, engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, fp32 average), each on the CPU of every rank. Collective."""
        names = [name for name, _ in engine.module.named_parameters()]
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}
        for index, name in enumerate(names):
            value = _from_owner(self.average.get(name), index, tuple(shapes[name]), torch.float32)
            yield name, value.cpu()
        yield from ((name, weight) for name, weight in engine.weights() if name not in shapes)

    @contextlib.contextmanager
    def applied(self, engine: Engine) -> Iterator[None]:
        """Put the averages into the module inside the block, and restore the trained weights bit for bit. Collective.

        Meanwhile each rank keeps the trained weights of its tensors in host memory: all ranks together hold them once.
        """
        kept: dict[str, torch.Tensor] = {}
        parameters = dict(engine.module.named_parameters())
        indices = {name: index for index, name in enumerate(parameters)}
        engine.flush_prefetch()
        for name, value in self.weights(engine):
            if name not in parameters:
                continue
            with engine.whole([parameters[name]], modifier_rank=0), torch.no_grad():
                if _is_mine(indices[name]):
                    kept[name] = parameters[name].detach().to("cpu", copy=True)
                parameters[name].copy_(value)
        try:
            yield
        finally:
            engine.flush_prefetch()
            for name, parameter in parameters.items():
                shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
                value = _from_owner(kept.pop(name, None), indices[name], shape, parameter.dtype)
                with engine.whole([parameter], modifier_rank=0), torch.no_grad():
                    parameter.copy_(value)

    def load(self, weights: Iterator[tuple[str, torch.Tensor]], updates: int) -> None:
        """Load saved averages. ``weights`` yields all of them, and each rank keeps its own."""
        for name, value in weights:
            if name in self.average:
                self.average[name].copy_(value)
        self.updates = updates

    @staticmethod
    def _trained(engine: Engine) -> Iterator[tuple[int, tuple[str, torch.Tensor]]]:
        parameters = dict(engine.module.named_parameters())
        return enumerate((name, weight) for name, weight in engine.weights() if name in parameters)


def _from_owner(value: torch.Tensor | None, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor that one rank keeps, on every rank. Collective."""
    if ranks.world_size() == 1 and value is not None:
        return value
    carried = torch.empty(shape, dtype=dtype, device=ranks.device()) if value is None else value.to(ranks.device())
    dist.broadcast(carried, src=index % ranks.world_size())
    return carried


def _is_mine(index: int) -> bool:
    return index % ranks.world_size() == ranks.rank()
