"""What every place with weights looks like from outside: names, shapes and dtypes at once, values one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch

from cogflow.weights.reader import TensorInfo


class Tensors(Protocol):
    """A safetensors folder, a mapped .pt file, the ranks' parts of a sharded checkpoint, or a view of one of them."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Known without touching a value."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, mapped from its file where that is possible: it costs memory only where it is touched."""


class Renamed:
    """Some tensors of another source, under other names. ``names``: new name -> name in ``source``."""

    def __init__(self, source: Tensors, names: Mapping[str, str]) -> None:
        self.source, self.names = source, dict(names)
        self.tensors: Mapping[str, TensorInfo] = {
            new: replace(source.tensors[old], name=new) for new, old in self.names.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(self.names[name])


def below(source: Tensors, prefix: str) -> Renamed:
    """The tensors whose names start with ``prefix``, without it."""
    return Renamed(source, {name.removeprefix(prefix): name for name in source.tensors if name.startswith(prefix)})
