"""The mended folder: the candidate, with what is guilty set right or taken from the reference, and the proof that it healed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogflow.diagnosis.finding import Finding
from cogflow.diagnosis.side import Side
from cogflow.errors import PipelineError
from cogflow.files.publish import write_json
from cogflow.pipeline.assemble import assemble
from cogflow.pipeline.consistency import check_parts
from cogflow.pipeline.parts import CONFIGS, Part

Proof = Callable[[Path], dict[str, Any]]


def mend(
    output: Path, scratch: Path, candidate: Side, reference: Side, guilty: Sequence[Finding], called: dict[str, Any], proof: Proof
) -> dict[str, Any]:
    """Publish ``output``; returns its assembly.json. ``proof`` is given the unpublished folder, and raises QualityGateError if not healed.

    ``called``: how to sample, for the card. Raises :class:`PipelineError` for what only a reference could mend where there is none.
    """
    parts = dict(candidate.parts)
    for component in dict.fromkeys(finding.component for finding in guilty):
        mine = [finding for finding in guilty if finding.component == component]
        if component == "sampling":
            called = called | {finding.name: finding.reference for finding in mine}
            continue
        fields = {finding.name: finding.reference for finding in mine if finding.kind == "config" and component != "tokenizer"}
        if len(fields) == len(mine) and component in parts:
            parts[component] = with_fields(parts[component], fields, scratch)
        elif component in reference.parts:
            parts[component] = reference.parts[component]
        else:
            raise PipelineError(
                f"{mine[0].place} ({mine[0].kind}) can only be mended from a reference, and there is none.",
                "Give stage.reference=FOLDER, a pipeline folder or a run that is known to be right.",
            )
    if missing := set(CONFIGS) - set(parts):
        raise PipelineError(f"The mended pipeline would have no {', '.join(sorted(missing))}.", "Give stage.reference=FOLDER.")
    expected = check_parts(parts, [])
    return assemble(output, parts, expected, called, proof)


def with_fields(part: Part, fields: dict[str, Any], scratch: Path) -> Part:
    """``part`` with these values in its config; its weights stay where they are."""
    name = CONFIGS[part.name]
    config = json.loads((part.folder / name).read_text(encoding="utf-8")) | fields
    path = scratch / part.name / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, config)
    return replace(part, settings=part.settings | fields, files=part.files | {name: path})
