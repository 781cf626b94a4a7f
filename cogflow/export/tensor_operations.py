"""Operations that map tensors from one layout of names to another, and tensors that one layout computes.

An operation is data: the names of the tensors it reads (``sources``) and makes (``targets``). Its inverse is computed
from it, so that one table of operations serves both directions. Nothing here knows a model;
:mod:`cogflow.export.sat_tables` does. Tensors keep their dtype. A target that is a part of one source is a view of
it.

Position tables, and a table that SAT never reads, are stored in one layout and computed in the other. They are
dropped with a reason; the opposite direction restores them from a formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from cogflow.errors import ConversionError

Shape = tuple[int, ...]


class Operation(Protocol):
    """Turns ``sources`` into ``targets``. Names may hold fields such as ``{layer}``, which :func:`fill_names`
    replaces."""

    @property
    def sources(self) -> tuple[str, ...]: ...

    @property
    def targets(self) -> tuple[str, ...]: ...

    @property
    def kind(self) -> str:
        """The name of the operation in export.json."""

    def out_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shape of each target. Raises :class:`ConversionError` for shapes that the operation cannot
        process."""

    def make(self, target: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return one target, made from all sources, in their dtype."""

    def inverse(self) -> Operation | None:
        """Return the operation that turns the targets into the sources, ``None`` if there is none."""


def apply_operation(operation: Operation, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return all targets of one operation by name."""
    return {target: operation.make(target, tensors) for target in operation.targets}


def inverse_table(table: Iterable[Operation]) -> tuple[Operation, ...]:
    """Return the table of the opposite direction, without the operations that have no inverse."""
    return tuple(inverse for operation in table if (inverse := operation.inverse()) is not None)


@dataclass(frozen=True)
class Rename:
    """Give one tensor another name."""

    source: str
    target: str
    kind = "rename"

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def out_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        return {self.target: shapes[self.source]}

    def make(self, target: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return tensors[self.source]

    def inverse(self) -> Rename:
        return Rename(self.target, self.source)


Chunk = tuple[int, int]
"""(index of a source, index of one of its chunks)."""


@dataclass(frozen=True)
class ChunkMap:
    """Distribute chunks of the sources' rows (dim 0) over the targets. Every chunk goes to exactly one target.

    ``target_chunks[i]`` lists the chunks of target ``i`` in order. All chunks have the same number of rows.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    target_chunks: tuple[tuple[Chunk, ...], ...]

    @property
    def kind(self) -> str:
        """``regroup`` if a target needs more than one run of a source, else ``split`` of one or ``merge`` of several
        sources."""
        if any(len(list(_runs(chunks))) != len({source for source, _ in chunks}) for chunks in self.target_chunks):
            return "regroup"
        return "split" if len(self.sources) == 1 else "merge"

    def chunk_count(self, source: int) -> int:
        return sum(chunk[0] == source for chunks in self.target_chunks for chunk in chunks)

    def out_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        chunk_shapes = set()
        for index, source in enumerate(self.sources):
            shape = shapes[source]
            count = self.chunk_count(index)
            if not shape or shape[0] % count or shape[0] == 0:
                raise ConversionError(
                    f"{source} of shape {list(shape)} cannot be cut into {count} equal parts of its rows."
                )
            chunk_shapes.add((shape[0] // count, *shape[1:]))
        if len(chunk_shapes) > 1:
            each = ", ".join(f"{source} {list(shapes[source])}" for source in self.sources)
            raise ConversionError(f"These tensors do not fit together: {each}.")
        rows, *rest = chunk_shapes.pop()
        return {
            target: (rows * len(chunks), *rest) for target, chunks in zip(self.targets, self.target_chunks, strict=True)
        }

    def make(self, target: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        runs: list[torch.Tensor] = []
        for source, first, last in _runs(self.target_chunks[self.targets.index(target)]):
            tensor = tensors[self.sources[source]]
            rows = tensor.shape[0] // self.chunk_count(source)
            runs.append(tensor[first * rows : (last + 1) * rows])
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def inverse(self) -> ChunkMap:
        positions = {
            chunk: (target, position)
            for target, chunks in enumerate(self.target_chunks)
            for position, chunk in enumerate(chunks)
        }
        source_chunks = tuple(
            tuple(positions[source, chunk] for chunk in range(self.chunk_count(source)))
            for source in range(len(self.sources))
        )
        return ChunkMap(self.targets, self.sources, source_chunks)


def _runs(chunks: tuple[Chunk, ...]) -> Iterator[tuple[int, int, int]]:
    """Yield (source, first chunk, last chunk) of each run of consecutive chunks, which can be read as one view."""
    start = chunks[0]
    for before, after in zip(chunks, (*chunks[1:], None), strict=True):
        if after is None or after != (before[0], before[1] + 1):
            yield start[0], start[1], before[1]
            start = after or start


def split_rows(source: str, *targets: str) -> ChunkMap:
    """Return the operation that gives each target an equal part of the rows of ``source``."""
    return ChunkMap((source,), targets, tuple(((0, part),) for part in range(len(targets))))


def regroup_rows(source: str, targets: Mapping[str, tuple[int, ...]]) -> ChunkMap:
    """Return the operation that concatenates numbered chunks of the rows. ``targets``: target to the numbers of its
    chunks."""
    return ChunkMap(
        (source,), tuple(targets), tuple(tuple((0, chunk) for chunk in chunks) for chunks in targets.values())
    )


@dataclass(frozen=True)
class Alias:
    """Keep once a tensor that is stored under several names. Different values raise :class:`ConversionError`."""

    sources: tuple[str, ...]
    target: str
    kind = "tie"

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def out_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        if len({shapes[source] for source in self.sources}) > 1:
            raise ConversionError(f"{' and '.join(self.sources)} should be one tensor but have different shapes.")
        return {self.target: shapes[self.sources[0]]}

    def make(self, target: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        first, *others = (tensors[source] for source in self.sources)
        for source, other in zip(self.sources[1:], others, strict=True):
            if not torch.equal(first, other):
                raise ConversionError(
                    f"{self.sources[0]} and {source} should be one tensor but their values differ.",
                    "Remove the wrong one from the file.",
                )
        return first

    def inverse(self) -> Unalias:
        return Unalias(self.target, self.sources)


@dataclass(frozen=True)
class Unalias:
    """Write one tensor under several names."""

    source: str
    targets: tuple[str, ...]
    kind = "untie"

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def out_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        return dict.fromkeys(self.targets, shapes[self.source])

    def make(self, target: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return tensors[self.source]

    def inverse(self) -> Alias:
        return Alias(self.targets, self.source)


def fill_names(table: Iterable[Operation], **fields: object) -> tuple[Operation, ...]:
    """Return the operations with the fields of their names replaced, such as ``layer=3`` for ``{layer}``."""
    return tuple(_fill_operation(operation, fields) for operation in table)


def _fill_operation(operation: Any, fields: Mapping[str, object]) -> Any:
    names = {}
    for attribute in ("source", "target", "sources", "targets"):
        if attribute in operation.__dataclass_fields__:
            value = getattr(operation, attribute)
            is_one = isinstance(value, str)
            names[attribute] = value.format(**fields) if is_one else tuple(name.format(**fields) for name in value)
    return replace(operation, **names)


POSITION_BASE = 10000.0
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
    angles = positions[:, None] * (1.0 / POSITION_BASE ** (np.arange(width // 2, dtype=np.float64) / (width / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def rotary_table(grid: TokenGrid, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return SAT's rotary tables (sines, cosines), each fp32 ``[grid.size, head_dim]``, equal to SAT's to the bit.

    A quarter of ``head_dim`` encodes time, three eighths rows, three eighths columns. SAT computes them in fp32
    throughout (``dit_video_concat.py``, tag v1.0).
    """
    shape = (grid.frames, grid.rows, grid.columns)
    parts = []
    for axis, width in enumerate((head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)):
        rates = 1.0 / (POSITION_BASE ** (torch.arange(0, width, 2).float() / width))
        angles = torch.outer(torch.arange(shape[axis], dtype=torch.float32), rates).repeat_interleave(2, dim=1)
        broadcast = [1, 1, 1, angles.shape[1]]
        broadcast[axis] = shape[axis]
        parts.append(angles.view(broadcast).expand(*shape, -1))
    table = torch.cat(parts, dim=-1).reshape(grid.size, -1)
    return table.sin(), table.cos()
