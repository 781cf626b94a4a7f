"""Compare a tensor of the candidate with one of the reference, and find which of the reference's tensors it really
is.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import torch

from cogflow.weights.tensor_source import WeightsFolder

CHUNK = 1 << 18
"""Values that are compared together: two copies in fp32 fit into the cache of a core."""

SAME_TENSOR = 0.9
"""Cosine from which two tensors count as the same one."""

ROW_PARTS = (2, 3, 6, 9)
"""Numbers of equal parts that the rows of adaLN layers consist of: shift, scale and gate of the video and text
tokens.
"""

HALF_DTYPES = (torch.bfloat16, torch.float16)
BLOCK = re.compile(
    r"^(.*?(?:blocks|block|resnets|layer|up_blocks|down_blocks)\.\d+(?:\.(?:resnets|layer|block)\.\d+)*)\."
)


@dataclass(frozen=True)
class TensorPair:
    """Comparison of two tensors of one shape.

    * ``cosine``: of all values; 1 when one is a multiple of the other.
    * ``change``: root mean square of the difference, divided by that of the reference.
    * ``largest``: largest absolute difference; ``relative``: divided by the reference's largest magnitude.
    * ``equal``: equal bit by bit, after a cast of the reference to the candidate's dtype.
    * ``only``: the smaller dtype that holds all values of the candidate but not of the reference: they were rounded.
    * ``constant``: the single value of the candidate, when the reference has several.
    * ``mean``, ``std``, ``absmax``: of the candidate and the reference.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    cosine: float
    change: float
    largest: float
    relative: float
    mean: tuple[float, float]
    std: tuple[float, float]
    absmax: tuple[float, float]
    non_finite: int
    equal: bool
    only: str | None
    constant: float | None

    @property
    def only_rounded(self) -> bool:
        """True when rounding explains the difference: bf16 keeps 8 bits of each value."""
        return self.only is not None and self.change < 2**-8


@dataclass
class _Statistics:
    """Sums over the chunks of one tensor."""

    total: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    low: float = float("inf")
    high: float = -float("inf")
    fits: dict[torch.dtype, bool] = field(default_factory=lambda: dict.fromkeys(HALF_DTYPES, True))

    def add(self, chunk: torch.Tensor) -> None:
        """Add a finite fp32 ``chunk``."""
        for dtype in HALF_DTYPES:
            self.fits[dtype] = self.fits[dtype] and torch.equal(chunk.to(dtype).float(), chunk)
        self.total += chunk.sum().double()
        self.squares += torch.dot(chunk, chunk).double()
        ends = chunk.aminmax()
        self.low, self.high = min(self.low, float(ends.min)), max(self.high, float(ends.max))

    @property
    def absmax(self) -> float:
        return max(abs(self.low), abs(self.high))

    def mean(self, count: int) -> float:
        return float(self.total) / count

    def std(self, count: int) -> float:
        variance = float(self.squares) / count - self.mean(count) ** 2
        return math.sqrt(max(0.0, variance))


def compare_tensors(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> TensorPair:
    """Compare two tensors of one shape and any floating dtype in one pass. Memory: a few chunks."""
    own, other = _Statistics(), _Statistics()
    products = torch.zeros(2, dtype=torch.float64)  # of both tensors; of their difference with itself
    largest, non_finite, equal = 0.0, 0, True
    for mine, yours in zip(ours.flatten().split(CHUNK), theirs.flatten().split(CHUNK), strict=True):
        equal = equal and bool(torch.equal(mine, yours.to(mine.dtype)))
        a, b = mine.float(), yours.float().nan_to_num(0.0, 0.0, 0.0)
        if not bool(a.isfinite().all()):
            non_finite += int((~a.isfinite()).sum())
            a = a.nan_to_num(0.0, 0.0, 0.0)
        own.add(a)
        other.add(b)
        difference = a - b
        products += torch.stack((torch.dot(a, b), torch.dot(difference, difference))).double()
        largest = max(largest, float(difference.abs().max()))
    count, product, error = max(1, ours.numel()), float(products[0]), float(products[1])
    norm = (float(own.squares) * float(other.squares)) ** 0.5
    rounded_to = next((dtype for dtype in HALF_DTYPES if own.fits[dtype] and not other.fits[dtype]), None)
    several = ours.numel() > 1
    is_constant = several and own.low == own.high and other.low != other.high
    return TensorPair(
        name=name,
        shape=tuple(ours.shape),
        dtypes=(_dtype_name(ours.dtype), _dtype_name(theirs.dtype)),
        cosine=product / norm if norm > 0 else float(own.squares == other.squares),
        change=(error / float(other.squares)) ** 0.5 if other.squares > 0 else float(error > 0),
        largest=largest,
        relative=largest / other.absmax if other.absmax > 0 else float(largest > 0),
        mean=(own.mean(count), other.mean(count)),
        std=(own.std(count), other.std(count)),
        absmax=(own.absmax, other.absmax),
        non_finite=non_finite,
        equal=equal,
        only=_dtype_name(rounded_to) if rounded_to is not None and several else None,
        constant=own.low if is_constant else None,
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def block_of(name: str) -> str:
    """Return the part of the model that a tensor belongs to: ``transformer_blocks.3``,
    ``decoder.up_blocks.1.resnets.0``.
    """
    found = BLOCK.match(name)
    return found[1] if found else name.split(".")[0]


def original_of(pair: TensorPair, ours: WeightsFolder, theirs: WeightsFolder) -> str | None:
    """Return the reference's tensor that the candidate's tensor equals, or ``None``.

    Tensors of the same block and tensors of the same name in other blocks are tried.
    """
    mine = ours.read(pair.name)
    block = block_of(pair.name)
    suffix = pair.name[len(block) :]
    others = [
        name
        for name, info in theirs.tensors.items()
        if name != pair.name
        and info.shape == pair.shape
        and (block_of(name) == block or (name.endswith(suffix) and suffix))
    ]
    cosines = {name: cosine(mine, theirs.read(name)) for name in others}
    best = max(cosines, key=lambda name: cosines[name], default=None)
    return best if best is not None and cosines[best] > SAME_TENSOR else None


def row_order_of(pair: TensorPair, ours: WeightsFolder, theirs: WeightsFolder) -> list[int] | None:
    """Return the order of the reference's rows, in equal parts, that gives the candidate's tensor; else ``None``.

    A transposed square matrix counts as the order 1, 0.
    """
    mine, other = ours.read(pair.name), theirs.read(pair.name)
    for parts in ROW_PARTS:
        if mine.shape[0] % parts or mine.shape[0] == parts:
            continue
        order = _part_order(mine.chunk(parts), other.chunk(parts))
        if sorted(order) == list(range(parts)) and order != sorted(order):
            return order
    if mine.dim() == 2 and mine.shape[0] == mine.shape[1] and cosine(mine.T.contiguous(), other) > SAME_TENSOR:
        return [1, 0]
    return None


def _part_order(pieces: tuple[torch.Tensor, ...], originals: tuple[torch.Tensor, ...]) -> list[int]:
    """Return for each piece the index of the original that it equals; fewer entries when a piece equals none."""
    order: list[int] = []
    for position, piece in enumerate(pieces):
        ranked = [(cosine(piece, original), index == position, -index) for index, original in enumerate(originals)]
        similarity, _, negative_index = max(ranked)
        if similarity <= SAME_TENSOR:
            break
        order.append(-negative_index)
    return order


def cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the cosine between two tensors with the same number of values; 1 when both are zero."""
    a, b = ours.flatten().float(), theirs.flatten().float()
    norm = float(a.norm() * b.norm())
    return float(torch.dot(a, b)) / norm if norm > 0 else float(not a.any() and not b.any())
