"""Antialiased bicubic resizing and the crop after it: the bytes that torch's ``functional.interpolate`` gives, several times as fast.

torch adds up each value by itself. Here bands of values are matrix products, which differ from torch's in the last bits; where that could
change a byte, the value is added up again in torch's own order. Whether that order is known on this machine is tried out when a size is met
first, against torch itself; where it is not, torch does the work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional

_BAND = 16  # outputs of one product: more waste products with zeros, fewer are too small for the cores
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


def _axis(before: int, after: int, start: int, count: int, rule: Rule) -> _Axis:
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
    for begin in range(0, count, _BAND):
        here = slice(begin, min(begin + _BAND, count))
        left, right = int(moved[here].min()), int(moved[here].max()) + most
        bands.append((begin, left - low, right - low, dense[here, left:right].contiguous()))
    return _Axis(moved - low, weights, plain, low, high, tuple(bands))


class _Products:
    """Resizing for one geometry. Threads may share one: each has its own buffers."""

    def __init__(self, geometry: Geometry, rule: Rule) -> None:
        (down, right), (height, width) = geometry.corner, geometry.shown
        self.down = _axis(geometry.size[0], geometry.scaled[0], down, height, rule)
        self.across = _axis(geometry.size[1], geometry.scaled[1], right, width, rule)
        self._shown = geometry.shown
        self._transposed = [(begin, left, right, band.t().contiguous()) for begin, left, right, band in self.across.bands]
        self._held = threading.local()

    def __call__(self, planes: Sequence[np.ndarray], out: torch.Tensor) -> None:
        source, values = self.values(planes)
        _, _, _, moved, low, high = self._buffers()
        for share, rounded in ((0.5 - _NEAR, low), (0.5 + _NEAR, high)):
            rounded.copy_(torch.add(values, share, out=moved).clamp_(0, 255))
        near = np.flatnonzero(low.numpy() != high.numpy())
        if near.size:
            found = self.exact(source, near)
            low.view(-1).numpy()[near] = np.rint(found).clip(0, 255).astype(np.uint8)
        out.copy_(low.permute(1, 0, 2))

    def values(self, planes: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """What of the planes is needed, fp32 ``[rows, 3, columns]``, and the values, fp32 ``[h, 3, w]``, right but for their last bits."""
        source, between, values, *_ = self._buffers()
        for channel, plane in enumerate(planes):
            source[:, channel].copy_(torch.from_numpy(plane[self.down.low : self.down.high, self.across.low : self.across.high]))
        rows, columns = source.view(len(source), -1), between.view(3 * len(between), -1)
        for begin, first, last, band in self.down.bands:
            torch.mm(band, rows[first:last], out=between.view(len(between), -1)[begin : begin + len(band)])
        for begin, first, last, band in self._transposed:
            torch.mm(columns[:, first:last], band, out=values.view(3 * len(values), -1)[:, begin : begin + band.shape[1]])
        return source, values

    def exact(self, source: torch.Tensor, places: np.ndarray) -> np.ndarray:
        """The values at ``places`` of the flat ``[h, 3, w]``, as torch adds them up: along rows first, then down."""
        row, channel, column = np.unravel_index(places, (self._shown[0], 3, self._shown[1]))
        down, across = self.down, self.across
        windows = np.lib.stride_tricks.sliding_window_view(source.numpy(), across.weights.shape[1], axis=2)
        rows = down.first[row][:, None] + np.arange(down.weights.shape[1])
        taken = windows[rows, channel[:, None], across.first[column][:, None]]
        along = _added(taken.transpose(2, 0, 1), across.weights[column].T[:, :, None], across.plain[column][:, None])
        return _added(along.T, down.weights[row].T, down.plain[row])

    def _buffers(self) -> tuple[torch.Tensor, ...]:
        if not hasattr(self._held, "buffers"):
            (height, width), rows, columns = self._shown, self.down.high - self.down.low, self.across.high - self.across.low
            floats = [torch.empty(size) for size in ((rows, 3, columns), (height, 3, columns), (height, 3, width), (height, 3, width))]
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
        source, values = products.values(list(picture))
        if float((values - wanted).abs().max()) > _NEAR / 2:
            return None
        if np.array_equal(products.exact(source, some), wanted.view(-1).numpy()[some]):
            return products
    return None
