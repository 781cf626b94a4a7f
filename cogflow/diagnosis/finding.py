"""Results of the steps of a diagnosis: findings, what each step measured, and trials of exchanged parts."""

from __future__ import annotations

from dataclasses import dataclass, field

from cogflow.files.record_io import JsonObject, JsonValue
from cogflow.records.pipeline_records import FindingRecord

FAULTY = 0.5
"""Confidence from which a finding counts as a fault. A finding below it is a note."""


@dataclass(frozen=True)
class DiagnosisFinding:
    """A difference from what the pipeline should be.

    * ``step``: facts, weights, rungs, swaps, precision or evidence.
    * ``component``: of the pipeline; ``sampling`` for the arguments of a call; ``pipeline`` for the samples as a whole.
    * ``kind``: config, dtype, missing, extra, shape, transposed, reset, swapped, permuted, replaced, mixed, training,
      rounded, non_finite, overflow, precision, broken, unknown, or a defect of the sharpness metrics.
    * ``name``: a config field, or with ``is_tensor`` a tensor or block; empty for the whole component.
    * ``candidate`` and ``reference``: the values.
    * ``confidence``: 0 to 1, that it degrades the samples; ``why``: how; ``fix``: options of a command that repairs it.
    """

    step: str
    component: str
    kind: str
    name: str = ""
    is_tensor: bool = False
    candidate: JsonValue = None
    reference: JsonValue = None
    rung: int | None = None
    confidence: float = FAULTY
    why: str = ""
    fix: str = ""

    @property
    def location(self) -> str:
        """``component.name``, or the component."""
        return f"{self.component}.{self.name}" if self.name else self.component

    @property
    def faulty(self) -> bool:
        """True when it counts as a fault."""
        return self.confidence >= FAULTY

    @property
    def of_weights(self) -> bool:
        """True when it concerns a tensor, a block or a whole component, not a config field."""
        return self.is_tensor or not self.name

    def line(self) -> str:
        """Return the finding as one line."""
        values = ""
        if self.candidate is not None:
            values = f": {_format_value(self.candidate)} instead of {_format_value(self.reference)}"
        return f"{self.location} ({self.kind.replace('_', ' ')}){values}. {self.why}".strip()

    def record(self) -> FindingRecord:
        """Return the finding as diagnosis.json holds it."""
        return FindingRecord(
            rung=self.rung,
            component=self.component,
            kind=self.kind,
            candidate=self.candidate,
            reference=self.reference,
            confidence=self.confidence,
            why=self.why,
            fix=self.fix,
            field=None if self.is_tensor else self.name or None,
            tensor=self.name if self.is_tensor else None,
        )


def _format_value(value: JsonValue) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class StepResult:
    """Result of one step. ``lines`` explain it on the terminal; ``measurements`` go into diagnosis.json."""

    name: str
    findings: list[DiagnosisFinding] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    measurements: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class WeightsResult(StepResult):
    """``compared``: components whose weights were compared; ``changed``: those that differ by more than a cast."""

    compared: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Suspect:
    """A field of a component's config, or with an empty ``field`` the whole component."""

    component: str
    field: str = ""

    @property
    def location(self) -> str:
        return f"{self.component}.{self.field}" if self.field else self.component


@dataclass(frozen=True)
class SwapTrial:
    """Samples with one suspect exchanged, compared with the target.

    ``alone``: PSNR in dB of the target with the candidate's suspect; ``without``: PSNR in dB of the candidate with the
    target's. ``defects``: of the sharpness metrics, of the target with the candidate's suspect. ``failed``: why it
    could not be loaded. ``visible``: whether the suspect alone changes the samples.
    """

    suspect: Suspect
    alone: float
    without: float
    defects: list[str]
    visible: bool
    failed: str = ""


@dataclass(frozen=True)
class SwapsResult(StepResult):
    """``psnr``: of the candidate against the target in dB. ``repaired_by``: the smallest set of suspects that explains
    it.
    """

    psnr: float = 0.0
    unexplained: bool = False
    repaired_by: list[Suspect] = field(default_factory=list)
    trials: list[SwapTrial] = field(default_factory=list)
