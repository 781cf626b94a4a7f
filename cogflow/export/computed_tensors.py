"""Tensors that one layout stores and the other computes: position tables and a table that SAT never reads.

Such a tensor is dropped with a reason. The opposite direction restores it from a formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from cogflow.export.tensor_operations import Shape

BASE = 10000.0
"""Base of the position tables' frequencies."""


@dataclass(frozen=True)
class TensorFormula:
    """Computes a tensor that holds nothing trained. ``make`` returns fp32 of ``shape``.

    ``exact``: the result equals the stored tensor. An inexact formula replaces a tensor that is loaded but never used.
    """

    shape: Shape
    make: Callable[[], torch.Tensor] = field(compare=False)
    description: str = ""
    exact: bool = True


@dataclass(frozen=True)
class Drop:
    """Drop a tensor that the other layout does not store. It may be absent. With a ``formula`` the inverse restores
    it."""

    source: str
    reason: str
    formula: TensorFormula | None = None
    kind = "drop"

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
        """Return the largest difference between ``tensor`` and the formula's result in the same dtype.

        The difference is infinite for another shape, and ``None`` without an exact formula. If it is larger than
        rounding, the model was trained with other values than the converted model will compute.
        """
        if self.formula is None or not self.formula.exact:
            return None
        if tuple(tensor.shape) != self.formula.shape:
            return float("inf")
        return float((tensor.float() - self.formula.make().to(tensor.dtype).float()).abs().max())

    def inverse(self) -> Restore | None:
        return None if self.formula is None else Restore(self.source, self.reason, self.formula)


@dataclass(frozen=True)
class Restore:
    """Compute a tensor that no file holds."""

    target: str
    reason: str
    formula: TensorFormula
    kind = "restore"

    @property
    def sources(self) -> tuple[str, ...]:
        return ()

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def out_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        return {self.target: self.formula.shape}

    def make(self, target: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.formula.make()

    def inverse(self) -> Drop:
        return Drop(self.target, self.reason, self.formula)


@dataclass(frozen=True)
class TokenGrid:
    """Video tokens of one clip. Tables order them by frame, then row, then column."""

    frames: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.frames * self.rows * self.columns

    def __str__(self) -> str:
        return f"{self.frames} x {self.rows} x {self.columns}"


def sincos_table(grid: TokenGrid, width: int, text_tokens: int, *, spatial: float, temporal: float) -> torch.Tensor:
    """Return SAT's sin-cos table, fp32 ``[1, text_tokens + grid.size, width]``: zeros for the text, then the video
    tokens.

    A quarter of the width encodes time, the rest space. Positions are divided by the interpolation factors
    ``spatial`` and ``temporal``. The result equals SAT's to the bit: float64 rounded to fp32 once, in the order of
    operations of ``dit_video_concat.py`` (zai-org/CogVideo, ``sat/``, tag v1.0).
    """
    time = _waves(np.arange(grid.frames, dtype=np.float32) / temporal, width // 4)
    half = width // 4 * 3 // 2
    down = _waves(np.arange(grid.rows, dtype=np.float32) / spatial, half)
    across = _waves(np.arange(grid.columns, dtype=np.float32) / spatial, half)
    table = np.empty((grid.frames, grid.rows, grid.columns, width))
    table[..., : width // 4] = time[:, None, None]
    table[..., width // 4 : width // 4 + half] = across[None, None]
    table[..., width // 4 + half :] = down[None, :, None]
    video = torch.from_numpy(table.reshape(1, -1, width)).float()
    return torch.cat([torch.zeros(1, text_tokens, width), video], dim=1)


def _waves(positions: npt.NDArray[np.float32], width: int) -> npt.NDArray[np.float64]:
    """Return float64 ``[positions, width]``: sines, then cosines."""
    angles = positions[:, None] * (1.0 / BASE ** (np.arange(width // 2, dtype=np.float64) / (width / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def rotary_table(grid: TokenGrid, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return SAT's rotary tables (sines, cosines), each fp32 ``[grid.size, head_dim]``, equal to SAT's to the bit.

    A quarter of ``head_dim`` encodes time, three eighths rows, three eighths columns. SAT computes them in fp32
    throughout (``dit_video_concat.py``, tag v1.0).
    """
    shape = (grid.frames, grid.rows, grid.columns)
    parts = []
    for axis, width in enumerate((head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)):
        rates = 1.0 / (BASE ** (torch.arange(0, width, 2).float() / width))
        angles = torch.outer(torch.arange(shape[axis], dtype=torch.float32), rates).repeat_interleave(2, dim=1)
        broadcast = [1, 1, 1, angles.shape[1]]
        broadcast[axis] = shape[axis]
        parts.append(angles.view(broadcast).expand(*shape, -1))
    table = torch.cat(parts, dim=-1).reshape(grid.size, -1)
    return table.sin(), table.cos()
