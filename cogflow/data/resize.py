"""Antialiased bicubic resizing and the crop after it: the bytes that torch's ``functional.interpolate`` gives, several times as fast.

torch adds up each value by itself. Here bands of values are matrix products, which differ from torch's in the last bits; where that could
change a byte, the value is added up again in torch's own order. Whether that order is known on this machine is tried out when a size is met
first, against torch itself; where it is not, torch does the work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional

# Outputs of one product: more waste work on zeros, fewer are too small for the cores. Rows are made by strips that stay in a core's cache.
_ROWS, _COLUMNS, _STRIP = 16, 32, 2
_LARGEST = 4096  # of a side that is tried out; the trial needs its square in memory
# Products and torch's sums are some 40 roundings of values below 512 apart, 3e-5 typically and 1e-4 among 50 million; this is twice that.
_NEAR = 2.0**-12

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class Geometry:
    """From frames of ``size`` to ``scaled``, of which ``shown`` is kept from ``corner`` (rows down, columns right) on."""

    size: Size
    scaled: Size
    corner: tuple[int, int]
    shown: Size


def resize(planes: Sequence[np.ndarray], geometry: Geometry, out: torch.Tensor) -> None:
    """Three ``planes`` uint8 ``[h, w]`` into ``out``, uint8 ``[3, *geometry.shown]``: resized bicubically, rounded, cropped."""
    if geometry.scaled == geometry.size:
        (down, right), (height, width) = geometry.corner, geometry.shown
        for plane, target in zip(planes, out, strict=True):
            target.copy_(torch.from_numpy(plane[down : down + height, right : right + width]))
        return
    products = _products(geometry)
    if products is None:
        out.copy_(_by_torch(planes, geometry))
    else:
        products(planes, out)


def _by_torch(planes: Sequence[np.ndarray], geometry: Geometry) -> torch.Tensor:
    """The same by torch alone: uint8 ``[3, h, w]``."""
    whole = interpolated(torch.stack([torch.from_numpy(plane) for plane in planes]).float(), geometry.scaled)
    (down, right), (height, width) = geometry.corner, geometry.shown
    return whole[:, down : down + height, right : right + width].round_().clamp_(0, 255).to(torch.uint8)


def interpolated(picture: torch.Tensor, size: Size) -> torch.Tensor:
    """fp32 ``[C, h, w]`` at ``size``, not rounded."""
    return functional.interpolate(picture[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0]


@dataclass(frozen=True)
class _Axis:
    """How the kept values of one axis are made of the input's: the ``first`` of each, and ``weights`` from there, fp32 ``[outputs, taps]``.

    ``plain``: up to which tap products are rounded before they are added; later ones are added by fused multiply-add.
    ``low`` and ``high``: the inputs that are needed at all; ``first`` and ``bands`` count from ``low``. ``bands``: (outputs from, inputs
    from, inputs to, fp32 ``[outputs, inputs]``).
    """

    first: np.ndarray
    weights: np.ndarray
    plain: np.ndarray
    low: int
    high: int
    bands: tuple[tuple[int, int, int, torch.Tensor], ...]


Rule = Callable[[int], int]
"""For a value of so many taps: how many products are rounded before they are added (see :class:`_Axis`)."""
# What compilers made of torch's loop: without FMA, and with it, by fours with a fused rest.
_RULES: tuple[Rule, ...] = (lambda taps: 1 + 4 * ((taps - 1) // 4), lambda taps: taps)


def _axis(before: int, after: int, start: int, count: int, rule: Rule, band: int) -> _Axis:
    # A picture of single bright pixels through torch itself gives the weights.
    dense = interpolated(torch.eye(before)[:, None, :], (1, after))[:, 0].t()[start : start + count].contiguous()
    scale = np.float32(before) / np.float32(after)
    support = np.float32(2) * max(scale, np.float32(1))
    center = scale * (np.arange(start, start + count, dtype=np.float32) + np.float32(0.5))
    first = np.maximum((center - support + np.float32(0.5)).astype(np.int64), 0)
    taps = np.minimum((center + support + np.float32(0.5)).astype(np.int64), before) - first
    most = int(taps.max())
    # Windows of equal length: near the end they begin earlier, with weights of zero, which add nothing.
    moved = np.minimum(first, before - most)
    weights = np.take_along_axis(dense.numpy(), moved[:, None] + np.arange(most), axis=1)
    plain = first - moved + np.array([rule(int(count)) for count in taps])
    low, high = int(moved.min()), int(moved.max()) + most
    bands = []
    for begin in range(0, count, band):
        here = slice(begin, min(begin + band, count))
        left, right = int(moved[here].min()), int(moved[here].max()) + most
        bands.append((begin, left - low, right - low, dense[here, left:right].contiguous()))
    return _Axis(moved - low, weights, plain, low, high, tuple(bands))


class _Products:
    """Resizing for one geometry. Threads may share one: each has its own buffers."""

    def __init__(self, geometry: Geometry, rule: Rule) -> None:
        (down, right), self._shown = geometry.corner, geometry.shown
        self.down = _axis(geometry.size[0], geometry.scaled[0], down, geometry.shown[0], rule, _ROWS)
        self.across = _axis(geometry.size[1], geometry.scaled[1], right, geometry.shown[1], rule, _COLUMNS)
        self._transposed = [
            (begin, left, right, band.t().contiguous()) for begin, left, right, band in self.across.bands
        ]
        self._strips = [self.down.bands[begin : begin + _STRIP] for begin in range(0, len(self.down.bands), _STRIP)]
        self._held = threading.local()

    def __call__(self, planes: Sequence[np.ndarray], out: torch.Tensor) -> None:
        *_, moved, low, high = self._buffers()
        for begin, values in self.strips(planes):
            here = slice(begin, begin + len(values))
            for share, rounded in ((0.5 - _NEAR, low), (0.5 + _NEAR, high)):
                rounded[here].copy_(torch.add(values, share, out=moved[: len(values)]).clamp_(0, 255))
        near = np.flatnonzero(low.numpy() != high.numpy())
        if near.size:
            low.view(-1).numpy()[near] = np.rint(self.exact(planes, near)).clip(0, 255).astype(np.uint8)
        out.copy_(low.permute(1, 0, 2))

    def strips(self, planes: Sequence[np.ndarray]) -> Iterator[tuple[int, torch.Tensor]]:
        """First row and values of each strip, fp32 ``[rows, 3, w]``, right but for their last bits; the next one overwrites them."""
        source, between, values, *_ = self._buffers()
        needed = [torch.from_numpy(plane) for plane in self._needed(planes)]
        for bands in self._strips:
            top, first, last = bands[0][0], bands[0][1], bands[-1][2]
            count = bands[-1][0] + len(bands[-1][3]) - top
            for channel, plane in enumerate(needed):
                source[: last - first, channel].copy_(plane[first:last])
            rows, made = source.view(len(source), -1), between.view(len(between), -1)
            for row, above, below, band in bands:
                torch.mm(band, rows[above - first : below - first], out=made[row - top : row - top + len(band)])
            columns, across = (
                between.view(3 * len(between), -1)[: 3 * count],
                values.view(3 * len(values), -1)[: 3 * count],
            )
            for column, left, right, band in self._transposed:
                torch.mm(columns[:, left:right], band, out=across[:, column : column + band.shape[1]])
            yield top, values[:count]

    def exact(self, planes: Sequence[np.ndarray], places: np.ndarray) -> np.ndarray:
        """The values at ``places`` of the flat ``[h, 3, w]``, as torch adds them up: along rows first, then down."""
        row, channel, column = np.unravel_index(places, (self._shown[0], 3, self._shown[1]))
        down, across = self.down, self.across
        rows = down.first[row][:, None] + np.arange(down.weights.shape[1])
        taken = np.empty((*rows.shape, across.weights.shape[1]), np.float32)
        for number, plane in enumerate(self._needed(planes)):
            here = channel == number
            windows = np.lib.stride_tricks.sliding_window_view(plane, taken.shape[2], axis=1)
            taken[here] = windows[rows[here], across.first[column[here]][:, None]]
        along = _added(taken.transpose(2, 0, 1), across.weights[column].T[:, :, None], across.plain[column][:, None])
        return _added(along.T, down.weights[row].T, down.plain[row])

    def _needed(self, planes: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [plane[self.down.low : self.down.high, self.across.low : self.across.high] for plane in planes]

    def _buffers(self) -> tuple[torch.Tensor, ...]:
        if not hasattr(self._held, "buffers"):
            (height, width), columns, most = self._shown, self.across.high - self.across.low, _ROWS * _STRIP
            rows = max(bands[-1][2] - bands[0][1] for bands in self._strips)
            floats = [
                torch.empty(size)
                for size in ((rows, 3, columns), (most, 3, columns), (most, 3, width), (most, 3, width))
            ]
            self._held.buffers = (*floats, *(torch.empty(height, 3, width, dtype=torch.uint8) for _ in range(2)))
        return self._held.buffers


def _added(values: np.ndarray, weights: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """The sum over the first axis of fp32 ``values`` times ``weights``, one after another, each sum rounded to fp32."""
    total = values[0] * weights[0]
    least = plain.min()
    for tap in range(1, len(values)):
        value, weight = values[tap], weights[tap]
        rounded = total + value * weight
        if tap >= least:
            # In fp64 the product is exact, so that only the sum is rounded.
            fused = (value.astype(np.float64) * weight + total).astype(np.float32)
            rounded = np.where(tap < plain, rounded, fused)
        total = rounded
    return total


@lru_cache(maxsize=16)  # a folder of clips has few sizes, and buckets multiply them by few
def _products(geometry: Geometry) -> _Products | None:
    """``None`` where torch's own order of additions is not known, or products are too coarse."""
    if max(*geometry.size, *geometry.scaled) > _LARGEST:
        return None
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (3, *geometry.size), dtype=np.uint8)
    (down, right), (height, width) = geometry.corner, geometry.shown
    whole = interpolated(torch.from_numpy(picture).float(), geometry.scaled)
    wanted = whole[:, down : down + height, right : right + width].permute(1, 0, 2).contiguous()
    edges = np.zeros((height, 3, width), bool)
    edges[[0, 1, -2, -1]] = edges[..., [0, 1, -2, -1]] = True
    some = np.concatenate([rng.choice(np.flatnonzero(edges), 4000), rng.integers(0, edges.size, 4000)])
    for rule in _RULES:
        products = _Products(geometry, rule)
        furthest = max(
            float((values - wanted[top : top + len(values)]).abs().max())
            for top, values in products.strips(list(picture))
        )
        if furthest > _NEAR / 2:
            return None
        if np.array_equal(products.exact(list(picture), some), wanted.view(-1).numpy()[some]):
            return products
    return None
