"""``export.json`` of an export folder: where the weights came from, what the cast changed, and what was proven."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from cogflow.errors import ConversionError, UserError
from cogflow.files.record_io import OMIT_NONE, JsonObject, Measured, Record
from cogflow.records.training_records import ModelIdentity, TrainedWith


@dataclass(frozen=True)
class FileBytes:
    """The size of a source file that was not hashed."""

    bytes: int


@dataclass(frozen=True)
class FactRow:
    """One fact of the conversion, as text, and the evidence for it."""

    fact: str
    value: str
    origin: Annotated[str, Field(alias="from")]


@dataclass(frozen=True)
class TensorStatistics:
    """One tensor that was written. Statistics leave NaN and infinity out; they are in double precision.

    ``sources`` and ``operation`` name what it was made of. ``changed``: largest absolute change of a value by the cast;
    ``relative``: largest change divided by the value. ``holds_only``: the smallest dtype that holds every value of a
    wider source (weights that were rounded earlier), or None. ``sha256``: of the bytes written.
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


@dataclass(frozen=True)
class CastSummary:
    """Counts over all tensors of a component, and the largest change by the cast."""

    tensors: int
    parameters: int
    operations: dict[str, int]
    changed: float
    relative: float
    became_zero: int
    became_subnormal: int
    became_inf: int
    holds_only: dict[str, int]


@dataclass(frozen=True)
class DroppedTensor:
    """A source tensor that no output is made of, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class ProofRun:
    """One comparison of outputs: which blocks ran, the largest difference, and the largest output.

    ``eps_difference``: largest difference against SAT's own epsilon of the last norm (1e-6; diffusers has 1e-5).
    """

    layers: list[int]
    difference: float
    absmax: float
    eps_difference: float


@dataclass(frozen=True)
class ProofRecord:
    """Proof that a component equals its source. ``what`` describes the check; other keys depend on it."""

    what: str
    tolerance: Annotated[float | None, OMIT_NONE] = None
    runs: Annotated[list[ProofRun] | None, OMIT_NONE] = None
    psnr_db: Annotated[Measured | None, OMIT_NONE] = None
    scaled_latents_std: Annotated[Measured | None, OMIT_NONE] = None
    tensors: Annotated[int | None, OMIT_NONE] = None


@dataclass(frozen=True)
class ComponentWeights:
    """The weights of a component beside the transformer."""

    summary: CastSummary
    weights_sha256: str
    tensors: list[TensorStatistics]


@dataclass(frozen=True)
class ExportRecord(Record):
    """``export.json``.

    The keys of the transformer (or of the only component) are at the top; others below ``components``.

    ``kind``: layout of the source. ``weights``: model or ema. ``source_files``: sha256, or the size where there is no
    hash. ``run``: absolute path of the run that the source is a checkpoint of; ``line`` and ``step``: of that run's
    history. None: unknown. ``weights_sha256`` and ``source_weights_sha256``: over names and values, after and before
    the cast.
    """

    file_name: ClassVar[str] = "export.json"
    advice: ClassVar[str] = "Export again."
    error: ClassVar[type[UserError]] = ConversionError

    source: str
    kind: str
    weights: str
    step: int | None
    family: str | None
    model: ModelIdentity | None
    trained_with: TrainedWith | None
    facts: list[FactRow]
    dtype: str
    source_files: dict[str, str | FileBytes]
    files: dict[str, str]
    source_weights_sha256: str
    weights_sha256: str
    summary: CastSummary
    lora: JsonObject | None
    ignored: dict[str, int]
    dropped: list[DroppedTensor]
    computed_tables: dict[str, float]
    proof: dict[str, ProofRecord]
    norm_eps: str | None
    diffusers: str
    torch: str
    tensors: list[TensorStatistics]
    components: dict[str, ComponentWeights] = field(default_factory=dict)
    run: Annotated[str | None, OMIT_NONE] = None
    line: Annotated[int | None, OMIT_NONE] = None
