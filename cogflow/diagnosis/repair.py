"""The mended folder: the candidate, with what is guilty set right or taken from the reference, and the proof that it healed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogflow.assemble.components import override_settings
from cogflow.assemble.consistency import check_components
from cogflow.assemble.pipeline_folder import PipelinePlan, write_pipeline
from cogflow.diagnosis.diagnosis_input import DiagnosisInput
from cogflow.diagnosis.finding import DiagnosisFinding
from cogflow.errors import PipelineError
from cogflow.models.code_check import CONFIGS
from cogflow.records.pipeline_records import AssemblyRecord, PipelineSampling, VerifyRecord

Proof = Callable[[Path], VerifyRecord]


def repair(
    output: Path, candidate: DiagnosisInput, reference: DiagnosisInput, guilty: Sequence[DiagnosisFinding], called: PipelineSampling, proof: Proof
) -> tuple[AssemblyRecord, list[DiagnosisFinding]]:  # fmt: skip
    """Publish ``output``; returns its assembly.json, and what no field can mend and no reference was there for (dtypes).

    ``proof`` is given the unpublished folder, and raises QualityGateError if it is not healed. ``called``: how to sample, for the card.
    Raises :class:`PipelineError` for weights that only a reference could mend where there is none.
    """
    parts = dict(candidate.parts)
    fields: dict[str, dict[str, Any]] = {}
    left: list[DiagnosisFinding] = []
    for component in dict.fromkeys(finding.component for finding in guilty):
        mine = [finding for finding in guilty if finding.component == component]
        if component == "sampling":
            called = replace(called, **{finding.name: finding.reference for finding in mine})
        elif all(finding.kind == "config" for finding in mine) and component in parts and component != "tokenizer":
            fields[component] = {finding.name: finding.reference for finding in mine}
        elif component in reference.parts:
            parts[component] = reference.parts[component]
        elif all(finding.kind in ("config", "dtype") for finding in mine):
            fields[component] = {finding.name: finding.reference for finding in mine if finding.kind == "config"}
            left += [finding for finding in mine if finding.kind == "dtype"]
        else:
            raise PipelineError(
                f"{mine[0].place} ({mine[0].kind}) can only be mended from a reference, and there is none.",
                "Give stage.reference=FOLDER, a pipeline folder or a run that is known to be right.",
            )
    if missing := set(CONFIGS) - set(parts):
        raise PipelineError(
            f"The mended pipeline would have no {', '.join(sorted(missing))}.", "Give stage.reference=FOLDER."
        )
    parts = override_settings(parts, fields)
    checks = check_components(parts, [], force=[finding.place for finding in left])
    return write_pipeline(output, PipelinePlan(parts, checks, called), proof), left
