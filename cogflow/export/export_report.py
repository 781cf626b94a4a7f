"""Build export.json: where the weights are from, what each tensor is made of, and what the cast changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import diffusers
import torch

from cogflow.errors import QualityGateError, format_list
from cogflow.export.export_plan import PreparedExport
from cogflow.export.origin import ExportOrigin
from cogflow.models.loading import dtype_name
from cogflow.records.export_records import (
    CastSummary,
    ComponentWeights,
    DroppedTensor,
    ExportRecord,
    FactRow,
    ProofRecord,
    TensorStatistics,
)
from cogflow.weights.tensor_source import fingerprint_line, join_fingerprint

NORM_EPS_NOTE = "1e-5, as published; SAT's last norm has 1e-6, which one config for all norms cannot state"


@dataclass(frozen=True)
class WrittenExport:
    """The result of an export: statistics of each component's tensors, sha256 of each file, and the checks of the
    components.

    ``tables``: see :func:`cogflow.export.export_plan.check_computed_tables`.
    """

    statistics: Mapping[str, list[TensorStatistics]]
    files: Mapping[str, str]
    proof: Mapping[str, ProofRecord]
    tables: Mapping[str, float] = field(default_factory=dict)


def export_record(prepared: PreparedExport, origin: ExportOrigin, written: WrittenExport) -> ExportRecord:
    """Return the content of export.json. The transformer's keys are at the top, other components' under
    ``components``."""
    facts = prepared.facts
    main = written.statistics.get("transformer", next(iter(written.statistics.values())))
    dtypes = {tensor.dtype_out for tensor in main}
    return ExportRecord(
        source=str(origin.place),
        kind=origin.kind,
        weights=origin.weights,
        step=origin.step,
        family=facts.family if facts else origin.training.family,
        model=origin.training.model,
        trained_with=facts.trained_with() if facts else origin.training.trained_with,
        facts=[FactRow(*row) for row in facts.rows()] if facts else [],
        dtype=dtype_name(getattr(torch, dtypes.pop())) if len(dtypes) == 1 else "mixed",
        source_files=dict(origin.files),
        files=dict(written.files),
        source_weights_sha256=_source_fingerprint(main),
        weights_sha256=_fingerprint(main),
        summary=summarise(main),
        lora=prepared.lora,
        ignored=prepared.ignored,
        dropped=[DroppedTensor(*one) for component in prepared.components for one in component.dropped],
        computed_tables=dict(written.tables),
        proof=dict(written.proof),
        norm_eps=NORM_EPS_NOTE if facts else None,
        diffusers=diffusers.__version__,
        torch=str(torch.__version__),
        tensors=main,
        components={
            name: ComponentWeights(summarise(tensors), _fingerprint(tensors), tensors)
            for name, tensors in written.statistics.items()
            if tensors is not main
        },
    )


def summarise(tensors: list[TensorStatistics]) -> CastSummary:
    """Return counts over all tensors and the largest change by the cast."""
    operations = [tensor.operation for tensor in tensors]
    rounded = [tensor.holds_only for tensor in tensors if tensor.holds_only]
    return CastSummary(
        tensors=len(tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        operations={kind: operations.count(kind) for kind in sorted(set(operations))},
        changed=max(tensor.changed for tensor in tensors),
        relative=max(tensor.relative for tensor in tensors),
        became_zero=sum(tensor.became_zero for tensor in tensors),
        became_subnormal=sum(tensor.became_subnormal for tensor in tensors),
        became_inf=sum(tensor.became_inf for tensor in tensors),
        holds_only={dtype: rounded.count(dtype) for dtype in sorted(set(rounded))},
    )


def refuse_nonfinite(prepared_from: str, statistics: Mapping[str, list[TensorStatistics]]) -> None:
    """Raise :class:`QualityGateError` naming the tensors with NaN or infinity before or after the cast."""
    tensors = [tensor for each in statistics.values() for tensor in each]
    problems = [f"{one.name}: {one.nonfinite} values that are not finite" for one in tensors if one.nonfinite]
    problems += [
        f"{one.name}: {one.became_inf} values beyond {one.dtype_out}'s range" for one in tensors if one.became_inf
    ]
    if problems:
        raise QualityGateError(
            f"{prepared_from} is not exported, because not every value would be finite:\n{format_list(problems)}",
            "Values beyond fp16's range fit into stage.dtype=bf16. NaN in a checkpoint means that training failed.",
        )


def _fingerprint(tensors: list[TensorStatistics]) -> str:
    """Return :func:`cogflow.weights.tensor_source.weights_fingerprint` of the written tensors."""
    return join_fingerprint(
        fingerprint_line(one.name, f"torch.{one.dtype_out}", tuple(one.shape), one.sha256) for one in tensors
    )


def _source_fingerprint(tensors: list[TensorStatistics]) -> str:
    """Return the fingerprint of the tensors before the cast."""
    return join_fingerprint(
        fingerprint_line(one.name, f"torch.{one.dtype_in}", tuple(one.shape), one.sha256_in) for one in tensors
    )
