"""Statistics of one tensor before and after a cast, collected chunk by chunk while the tensor is written."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from cogflow.records.export_records import TensorStatistics

CHUNK = 1 << 16
"""Values processed together. Their copies in double precision fit into a core's cache: whole tensors took 20 times as
long."""

NARROWER = {
    torch.float32: (torch.bfloat16, torch.float16),
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
}
"""Dtype to smaller dtypes that its values may have been rounded to before they were stored."""


@dataclass
class RunningMoments:
    """Mean, standard deviation and largest magnitude of the finite values added so far."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    absmax: float = 0.0
    nonfinite: int = 0

    def add(self, values: torch.Tensor) -> None:
        """Add float64 ``values`` ``[n]``."""
        if values.numel() == 0:
            return
        squares = float(torch.dot(values, values))
        if squares - squares != 0.0:  # the values hold NaN or infinity, or their squares overflow a double
            finite = values[values.isfinite()]
            self.nonfinite += values.numel() - finite.numel()
            values = finite
            squares = float(torch.dot(finite, finite))
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
        """The standard deviation of all values, not of a sample (divisor n)."""
        return max(0.0, self.squares / self.count - self.mean**2) ** 0.5 if self.count else 0.0


@dataclass
class CastStatistics:
    """Cast one tensor from ``dtype_in`` to ``dtype_out`` piece by piece and collect its statistics."""

    dtype_in: torch.dtype
    dtype_out: torch.dtype
    before: RunningMoments = field(default_factory=RunningMoments)
    after: RunningMoments = field(default_factory=RunningMoments)
    changed: float = 0.0
    relative: float = 0.0
    became_inf: int = 0
    became_zero: int = 0
    became_subnormal: int = 0

    def __post_init__(self) -> None:
        self.narrower = list(NARROWER.get(self.dtype_in, ()))

    def cast(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``values`` ``[n]`` in ``dtype_out`` and add them to the statistics."""
        if self.dtype_in == self.dtype_out:
            for chunk in values.split(CHUNK):
                self.before.add(chunk.double())
                self._exclude_narrower(chunk)
            return values
        return torch.cat([self._cast_chunk(chunk) for chunk in values.split(CHUNK)])

    def _cast_chunk(self, chunk: torch.Tensor) -> torch.Tensor:
        result = chunk.to(self.dtype_out)
        old = chunk.double()
        new = result.double()
        nonfinite_in = self.before.nonfinite
        self.before.add(old)
        nonfinite_out = self.after.nonfinite
        self.after.add(new)
        self.became_inf += (self.after.nonfinite - nonfinite_out) - (self.before.nonfinite - nonfinite_in)
        self._exclude_narrower(chunk)
        if not torch.equal(old, new):
            self._count_changes(old, new)
        return result

    def _count_changes(self, old: torch.Tensor, new: torch.Tensor) -> None:
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
            subnormal = (new.abs() < torch.finfo(self.dtype_out).tiny) & (new != 0) & (old.abs() >= tiny_in)
            self.became_subnormal += int(subnormal.sum())

    def _exclude_narrower(self, chunk: torch.Tensor) -> None:
        """Remove the narrower dtypes that cannot hold every value of ``chunk``."""
        for dtype in list(self.narrower):
            if not torch.equal(chunk.to(dtype).to(chunk.dtype), chunk):
                self.narrower.remove(dtype)

    def result(
        self, name: str, sources: list[str], operation: str, shape: list[int], *, sha256_in: str, sha256: str
    ) -> TensorStatistics:
        """Return the statistics of all values cast so far, with the tensor's description."""
        after = self.before if self.dtype_in == self.dtype_out else self.after
        # If bf16 and fp16 both hold every value (only zeros, say), no rounding is evident. NARROWER lists bf16, the
        # usual dtype of training, first.
        rounded = bool(self.narrower) and self.before.absmax > 0
        return TensorStatistics(
            name=name,
            sources=sources,
            operation=operation,
            shape=shape,
            dtype_in=torch_dtype_name(self.dtype_in),
            dtype_out=torch_dtype_name(self.dtype_out),
            mean_in=self.before.mean,
            std_in=self.before.std,
            absmax_in=self.before.absmax,
            mean_out=after.mean,
            std_out=after.std,
            absmax_out=after.absmax,
            changed=self.changed,
            relative=self.relative,
            nonfinite=self.before.nonfinite,
            became_inf=self.became_inf,
            became_zero=self.became_zero,
            became_subnormal=self.became_subnormal,
            holds_only=torch_dtype_name(self.narrower[0]) if rounded else None,
            sha256_in=sha256_in,
            sha256=sha256,
        )


def torch_dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype without the module, such as ``float32``."""
    return str(dtype).removeprefix("torch.")
