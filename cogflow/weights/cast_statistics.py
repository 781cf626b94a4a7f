"""The numbers of one tensor before and after a cast, gathered chunk by chunk while it passes by."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

CHUNK = 1 << 16
"""Values looked at together. Their copies in double precision stay in a core's cache, which is what makes this fast:
chunks of a whole tensor took twenty times as long."""

NARROWER = {
    torch.float32: (torch.bfloat16, torch.float16),
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
}
"""Dtype -> smaller dtypes that its values may have been rounded to before they were stored."""


@dataclass(frozen=True)
class TensorFacts:
    """One tensor that was written. Statistics leave NaN and infinity out; they are in double precision.

    ``sources`` and ``operation`` say what it was made of. ``changed`` is the largest absolute change of a value by the cast,
    ``relative`` the largest of those divided by the value. ``holds_only`` names the smallest dtype that holds every value of a
    wider source (weights that were rounded earlier), if there is one. ``sha256`` is over the bytes written.
    """

    name: str
    sources: list[str]
    operation: str
    shape: list[int]
    dtype_in: str
    dtype_out: str
    mean_in: float
    std_in: float
    absmax_in: float
    mean_out: float
    std_out: float
    absmax_out: float
    changed: float
    relative: float
    nonfinite: int
    became_inf: int
    became_zero: int
    became_subnormal: int
    holds_only: str | None
    sha256_in: str
    sha256: str


@dataclass
class Moments:
    """Mean, standard deviation and largest magnitude of the finite values added so far."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    absmax: float = 0.0
    nonfinite: int = 0

    def add(self, values: torch.Tensor) -> None:
        """``values``: doubles ``[n]``."""
        if values.numel() == 0:
            return
        squares = float(torch.dot(values, values))
        if squares - squares != 0.0:  # NaN or infinity among them, or squares too large for a double
            finite = values[values.isfinite()]
            self.nonfinite += values.numel() - finite.numel()
            values, squares = finite, float(torch.dot(finite, finite))
            if values.numel() == 0:
                return
        low, high = torch.aminmax(values)
        self.count += values.numel()
        self.total += float(values.sum())
        self.squares += squares
        self.absmax = max(self.absmax, -float(low), float(high))

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """Of all values, not of a sample."""
        return max(0.0, self.squares / self.count - self.mean**2) ** 0.5 if self.count else 0.0


@dataclass
class CastStatistics:
    """Statistics of one tensor on its way from ``dtype_in`` to ``dtype_out``."""

    dtype_in: torch.dtype
    dtype_out: torch.dtype
    before: Moments = field(default_factory=Moments)
    after: Moments = field(default_factory=Moments)
    changed: float = 0.0
    relative: float = 0.0
    became_inf: int = 0
    became_zero: int = 0
    became_subnormal: int = 0

    def __post_init__(self) -> None:
        self.narrower = list(NARROWER.get(self.dtype_in, ()))

    def cast(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` ``[n]`` in ``dtype_out``, counted on the way."""
        if self.dtype_in == self.dtype_out:
            for chunk in values.split(CHUNK):
                self.before.add(chunk.double())
                self._narrow(chunk)
            return values
        return torch.cat([self._cast(chunk) for chunk in values.split(CHUNK)])

    def _cast(self, chunk: torch.Tensor) -> torch.Tensor:
        result = chunk.to(self.dtype_out)
        old, new = chunk.double(), result.double()
        found = self.before.nonfinite
        self.before.add(old)
        lost = self.after.nonfinite
        self.after.add(new)
        self.became_inf += (self.after.nonfinite - lost) - (self.before.nonfinite - found)
        self._narrow(chunk)
        if torch.equal(old, new):
            return result
        difference = (new - old).abs_()
        finite = difference.isfinite()
        if not bool(finite.all()):
            difference = difference.where(finite, 0.0)
        self.changed = max(self.changed, float(difference.max()))
        nonzero = old != 0
        self.relative = max(self.relative, float(torch.where(nonzero & finite, difference / old.abs(), 0.0).max()))
        self.became_zero += int(((new == 0) & nonzero).sum())
        if self.dtype_out.is_floating_point:
            tiny_in = torch.finfo(self.dtype_in).tiny if self.dtype_in.is_floating_point else 0.0
            small = (new.abs() < torch.finfo(self.dtype_out).tiny) & (new != 0) & (old.abs() >= tiny_in)
            self.became_subnormal += int(small.sum())
        return result

    def _narrow(self, chunk: torch.Tensor) -> None:
        for dtype in list(self.narrower):
            if not torch.equal(chunk.to(dtype).to(chunk.dtype), chunk):
                self.narrower.remove(dtype)

    def facts(
        self, name: str, sources: list[str], operation: str, shape: list[int], sha256_in: str, sha256: str
    ) -> TensorFacts:
        after = self.before if self.dtype_in == self.dtype_out else self.after
        # Of two halves that both hold everything, zeros for one, neither tells of a rounding: name the one that training uses.
        holds_only = short(self.narrower[0]) if self.narrower and self.before.absmax > 0 else None
        return TensorFacts(
            name, sources, operation, shape, short(self.dtype_in), short(self.dtype_out),
            self.before.mean, self.before.std, self.before.absmax, after.mean, after.std, after.absmax,
            self.changed, self.relative, self.before.nonfinite, self.became_inf, self.became_zero, self.became_subnormal,
            holds_only, sha256_in, sha256,
        )  # fmt: skip


def short(dtype: torch.dtype) -> str:
    """As torch names it, without the module: float32."""
    return str(dtype).removeprefix("torch.")
