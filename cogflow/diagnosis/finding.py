"""What a step of the diagnosis says."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

FAULTY = 0.5
"""Confidence from which a finding is a fault; below it is a difference worth a line."""


@dataclass(frozen=True)
class DiagnosisFinding:
    """One thing that is not as it should be.

    * ``step``: facts, weights, rungs, swaps, precision or evidence; ``component``: of the pipeline, or ``sampling`` for how it is called;
    * ``kind``: config, dtype, missing, extra, shape, reset, swapped, replaced, mixed, rounded, non_finite, overflow, broken;
    * ``name``: a config's field, or a tensor or block; ``is_tensor`` says which. Empty for a whole component;
    * ``candidate`` and ``reference``: its value on either side, as JSON;
    * ``confidence``: 0..1 that it harms the picture; ``why``: how; ``fix``: words of a command that mends it.
    """

    step: str
    component: str
    kind: str
    name: str = ""
    is_tensor: bool = False
    candidate: Any = None
    reference: Any = None
    rung: int | None = None
    confidence: float = FAULTY
    why: str = ""
    fix: str = ""

    @property
    def place(self) -> str:
        return f"{self.component}.{self.name}" if self.name else self.component

    @property
    def guilty(self) -> bool:
        return self.confidence >= FAULTY

    def sure(self, confidence: float) -> DiagnosisFinding:
        return replace(self, confidence=round(confidence, 2))

    def line(self) -> str:
        values = f": {_short(self.candidate)} instead of {_short(self.reference)}" if self.candidate is not None else ""
        return f"{self.place} ({self.kind.replace('_', ' ')}){values}. {self.why}".strip()

    def as_dict(self) -> dict[str, Any]:
        return {
            "rung": self.rung, "component": self.component, "tensor" if self.is_tensor else "field": self.name or None,
            "kind": self.kind, "candidate": self.candidate, "reference": self.reference, "confidence": self.confidence,
            "why": self.why, "fix": self.fix,
        }  # fmt: skip


@dataclass(frozen=True)
class StepResult:
    """``lines`` explain the step on the terminal; ``facts`` go into diagnosis.json."""

    name: str
    findings: list[DiagnosisFinding] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
