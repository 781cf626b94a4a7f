"""Tensors that one layout keeps and the other computes: dropped with a reason, restored by a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cogflow.export.algebra import Shape


@dataclass(frozen=True)
class Recipe:
    """How a tensor that carries no training is computed. ``make`` gives fp32 of ``shape``; ``exact``: it is what the other side had.

    A recipe that is not exact stands in for a tensor that is read from a file but never used.
    """

    shape: Shape
    make: Callable[[], torch.Tensor] = field(compare=False)
    how: str = ""
    exact: bool = True


@dataclass(frozen=True)
class Drop:
    """A tensor that the other layout does not keep, and why. It may be absent. With a recipe the way back restores it."""

    source: str
    reason: str
    recipe: Recipe | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        return ()

    def out_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        return {}

    def make(self, target: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        raise KeyError(target)

    def difference(self, tensor: torch.Tensor) -> float | None:
        """Largest difference between what is dropped and what the recipe gives in the same dtype; ``None`` without an exact recipe.

        It is 0 for a table that the other side computes alike, and infinite for one of another shape: then what the model was
        trained with is not what the converted one will use.
        """
        if self.recipe is None or not self.recipe.exact:
            return None
        if tuple(tensor.shape) != self.recipe.shape:
            return float("inf")
        return (tensor.float() - self.recipe.make().to(tensor.dtype).float()).abs().max().item()

    def inverse(self) -> Restore | None:
        return None if self.recipe is None else Restore(self.source, self.reason, self.recipe)

    def describe(self) -> dict[str, Any]:
        return {"operation": "drop", "reason": self.reason}


@dataclass(frozen=True)
class Restore:
    """A tensor that comes from no file: its recipe computes it."""

    target: str
    reason: str
    recipe: Recipe

    @property
    def sources(self) -> tuple[str, ...]:
        return ()

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def out_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        return {self.target: self.recipe.shape}

    def make(self, target: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.recipe.make()

    def inverse(self) -> Drop:
        return Drop(self.target, self.reason, self.recipe)

    def describe(self) -> dict[str, Any]:
        return {"operation": "restore", "how": self.recipe.how, "exact": self.recipe.exact}
