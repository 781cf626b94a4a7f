"""What may happen to a tensor on its way from one layout of names to another.

An operation is data: which tensors go in, which come out. Its inverse is computed from it, so a table is written once and read in
both directions. Nothing here knows a model; the tables do. Values stay in their dtype and, where a part of a tensor is asked for,
are views of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from cogflow.errors import ConversionError

Shape = tuple[int, ...]


class Operation(Protocol):
    """``sources`` become ``targets``. Names may hold fields such as ``{layer}`` until :func:`bound` fills them in."""

    @property
    def sources(self) -> tuple[str, ...]: ...

    @property
    def targets(self) -> tuple[str, ...]: ...

    def out_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Shape of each target, from the sources' shapes. Raises :class:`ConversionError` for shapes it cannot work on."""

    def make(self, target: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One target from all sources, in their dtype."""

    def inverse(self) -> Operation | None:
        """The way back; ``None`` where there is none."""

    def describe(self) -> dict[str, Any]:
        """What a report says of it, as plain JSON values."""


def forward(operation: Operation, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All targets of one operation."""
    return {target: operation.make(target, tensors) for target in operation.targets}


def invert(table: Iterable[Operation]) -> tuple[Operation, ...]:
    """The table of the way back."""
    return tuple(back for operation in table if (back := operation.inverse()) is not None)


@dataclass(frozen=True)
class Rename:
    """One tensor under another name."""

    source: str
    target: str

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

    def describe(self) -> dict[str, Any]:
        return {"operation": "rename"}


Piece = tuple[int, int]  # (which source, which of its chunks)


@dataclass(frozen=True)
class ChunkMap:
    """Chunks of the sources' rows (dim 0), dealt to the targets: every chunk goes to exactly one place.

    ``dealt[i]`` lists the pieces of target ``i`` in order. All chunks have the same number of rows.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    dealt: tuple[tuple[Piece, ...], ...]

    def chunks(self, source: int) -> int:
        return sum(piece[0] == source for pieces in self.dealt for piece in pieces)

    def out_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        rows = set()
        for index, source in enumerate(self.sources):
            shape, chunks = shapes[source], self.chunks(index)
            if not shape or shape[0] % chunks or shape[0] == 0:
                raise ConversionError(
                    f"{source} of shape {list(shape)} cannot be cut into {chunks} equal parts of its rows."
                )
            rows.add((shape[0] // chunks, *shape[1:]))
        if len(rows) > 1:
            each = ", ".join(f"{source} {list(shapes[source])}" for source in self.sources)
            raise ConversionError(f"These do not fit together: {each}.")
        height, *rest = rows.pop()
        return {target: (height * len(pieces), *rest) for target, pieces in zip(self.targets, self.dealt, strict=True)}

    def make(self, target: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        pieces = self.dealt[self.targets.index(target)]
        runs: list[torch.Tensor] = []
        for source, first, last in _runs(pieces):
            tensor = tensors[self.sources[source]]
            rows = tensor.shape[0] // self.chunks(source)
            runs.append(tensor[first * rows : (last + 1) * rows])
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def inverse(self) -> ChunkMap:
        places = {
            piece: (target, place) for target, pieces in enumerate(self.dealt) for place, piece in enumerate(pieces)
        }
        back = tuple(
            tuple(places[source, chunk] for chunk in range(self.chunks(source))) for source in range(len(self.sources))
        )
        return ChunkMap(self.targets, self.sources, back)

    def describe(self) -> dict[str, Any]:
        kind = "split" if len(self.sources) == 1 else "merge"
        if any(len(list(_runs(pieces))) != len({source for source, _ in pieces}) for pieces in self.dealt):
            kind = "regroup"
        dealt = {
            t: [[self.sources[s], c] for s, c in pieces] for t, pieces in zip(self.targets, self.dealt, strict=True)
        }
        return {"operation": kind, "chunks": dealt}


def _runs(pieces: tuple[Piece, ...]) -> Iterable[tuple[int, int, int]]:
    """(source, first chunk, last chunk) of each stretch that lies together in its source, so that it can be read as one view."""
    start = pieces[0]
    for before, after in zip(pieces, (*pieces[1:], None), strict=True):
        if after is None or after != (before[0], before[1] + 1):
            yield start[0], start[1], before[1]
            start = after or start


def split(source: str, *targets: str) -> ChunkMap:
    """Equal parts of the rows, one to each target."""
    return ChunkMap((source,), targets, tuple(((0, part),) for part in range(len(targets))))


def regroup(source: str, targets: Mapping[str, tuple[int, ...]]) -> ChunkMap:
    """Chunks of the rows by number: target to the chunks it is made of."""
    return ChunkMap(
        (source,), tuple(targets), tuple(tuple((0, chunk) for chunk in chunks) for chunks in targets.values())
    )


@dataclass(frozen=True)
class Alias:
    """The same tensor under several names, kept once. Values that differ stop the conversion: which is meant cannot be known."""

    sources: tuple[str, ...]
    target: str

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
                    "Leave the wrong one out of the file.",
                )
        return first

    def inverse(self) -> Unalias:
        return Unalias(self.target, self.sources)

    def describe(self) -> dict[str, Any]:
        return {"operation": "tie", "kept once of": list(self.sources)}


@dataclass(frozen=True)
class Unalias:
    """One tensor written under several names."""

    source: str
    targets: tuple[str, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def out_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        return dict.fromkeys(self.targets, shapes[self.source])

    def make(self, target: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return tensors[self.source]

    def inverse(self) -> Alias:
        return Alias(self.targets, self.source)

    def describe(self) -> dict[str, Any]:
        return {"operation": "untie"}


def bound(rows: Iterable[Operation], **fields: object) -> tuple[Operation, ...]:
    """The same operations with the fields of their names filled in, such as ``layer=3`` for ``{layer}``."""
    return tuple(_bound(row, fields) for row in rows)


def _bound(row: Any, fields: Mapping[str, object]) -> Any:
    names = {}
    for part in ("source", "target", "sources", "targets"):
        if part in row.__dataclass_fields__:
            value = getattr(row, part)
            names[part] = (
                value.format(**fields) if isinstance(value, str) else tuple(name.format(**fields) for name in value)
            )
    return replace(row, **names)
