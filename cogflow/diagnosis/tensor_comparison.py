"""One tensor of the candidate against one of the reference, in a single pass over both, chunk by chunk."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

CHUNK = 1 << 18  # values looked at together: two copies in fp32 stay in a core's cache
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Pair:
    """What two tensors of one shape have to do with each other.

    ``cosine``: of all values (1: one is the other times a number). ``change``: root mean square of the difference over that of the
    reference; ``largest``: the largest absolute difference; ``relative``: that over the reference's largest magnitude. ``equal``: to
    the bit, or but for the cast to the candidate's dtype. ``only``: the smaller dtype that holds all of the candidate's values but not
    the reference's: they were rounded on the way. ``constant``: the one value of all of the candidate's, where the reference has several.
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> Pair:
    """Both of one shape, any floating dtype. Memory: a few chunks."""
    sums = torch.zeros(8, dtype=torch.float64)
    largest = absmax = other_absmax = 0.0
    non_finite, equal = 0, True
    ours_in, theirs_in = dict.fromkeys(HALVES, True), dict.fromkeys(HALVES, True)
    low, high, other_low, other_high = [float("inf"), -float("inf")] * 2
    for mine, other in zip(ours.flatten().split(CHUNK), theirs.flatten().split(CHUNK), strict=True):
        equal = equal and bool(torch.equal(mine, other.to(mine.dtype)))
        a, b = mine.float(), other.float()
        if not bool(a.isfinite().all()):
            non_finite += int((~a.isfinite()).sum())
            a = a.nan_to_num(0.0, 0.0, 0.0)
        b = b.nan_to_num(0.0, 0.0, 0.0)
        for half in HALVES:
            ours_in[half] = ours_in[half] and torch.equal(a.to(half).float(), a)
            theirs_in[half] = theirs_in[half] and torch.equal(b.to(half).float(), b)
        difference = a - b
        values = (
            a.sum(),
            b.sum(),
            torch.dot(a, a),
            torch.dot(b, b),
            torch.dot(a, b),
            torch.dot(difference, difference),
        )
        sums[: len(values)] += torch.stack(values).double()
        largest = max(largest, float(difference.abs().max()))
        ends, other_ends = a.aminmax(), b.aminmax()
        low, high = min(low, float(ends.min)), max(high, float(ends.max))
        other_low, other_high = min(other_low, float(other_ends.min)), max(other_high, float(other_ends.max))
    absmax, other_absmax = max(abs(low), abs(high)), max(abs(other_low), abs(other_high))
    return _pair(name, ours, theirs, sums.tolist(), largest, (low, high), (other_low, other_high), absmax, other_absmax, non_finite, equal,
                 next((half for half in HALVES if ours_in[half] and not theirs_in[half]), None))  # fmt: skip


def _pair(
    name: str, ours: torch.Tensor, theirs: torch.Tensor, sums: list[float], largest: float, ends: tuple[float, float],
    other_ends: tuple[float, float], absmax: float, other_absmax: float, non_finite: int, equal: bool, half: torch.dtype | None,
) -> Pair:  # fmt: skip
    count = max(1, ours.numel())
    total, other, squares, other_squares, product, error = sums[:6]
    means = total / count, other / count
    stds = (max(0.0, squares / count - means[0] ** 2) ** 0.5, max(0.0, other_squares / count - means[1] ** 2) ** 0.5)
    norm = (squares * other_squares) ** 0.5
    constant = ends[0] if ends[0] == ends[1] and other_ends[0] != other_ends[1] else None
    return Pair(
        name, tuple(ours.shape), (short(ours.dtype), short(theirs.dtype)), product / norm if norm > 0 else float(squares == other_squares),
        (error / other_squares) ** 0.5 if other_squares > 0 else float(error > 0), largest,
        largest / other_absmax if other_absmax > 0 else float(largest > 0), means, stds, (absmax, other_absmax), non_finite, equal,
        short(half) if half is not None and ours.numel() > 1 else None, constant if ours.numel() > 1 else None,
    )  # fmt: skip


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The cosine between two tensors of as many values; for finding out which tensor another one really is."""
    a, b = ours.flatten().float(), theirs.flatten().float()
    norm = float(a.norm() * b.norm())
    return float(torch.dot(a, b)) / norm if norm > 0 else float(not a.any() and not b.any())


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
