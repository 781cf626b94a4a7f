"""stage=diagnose: which component, field or tensor makes a pipeline blurry, and the command that mends it."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cogflow.artifacts.identify import kind_named
from cogflow.config.config import Config
from cogflow.config.diagnose_settings import DiagnoseStage
from cogflow.diagnosis.conclusion import Diagnosis, as_json, conclude, mending
from cogflow.diagnosis.diagnosis_input import resolve
from cogflow.diagnosis.examination import Examination
from cogflow.diagnosis.finding import StepResult
from cogflow.diagnosis.html_page import write_page
from cogflow.diagnosis.repair import repair
from cogflow.errors import QualityGateError
from cogflow.files.atomic_write import write_json
from cogflow.files.paths import run_folder
from cogflow.records.pipeline_records import VerifyRecord
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.tracking.html_report import record_stage
from cogflow.tracking.tracker import open_tracker

ORDER = ("facts", "weights", "rungs", "swaps", "precision", "evidence")


def run(config: Config[DiagnoseStage]) -> None:
    """Look at ``stage.candidate``, write ``<run>/diagnosis.json`` and ``diagnosis.html``; exit code 3 when something is wrong with it."""
    if ranks.is_main():
        diagnose(config)
    ranks.barrier()


def diagnose(config: Config[DiagnoseStage]) -> None:
    stage = config.stage
    started = time.time()
    folder = run_folder(config.run)
    place = Path(stage.candidate).expanduser() if stage.candidate else folder
    kind = kind_named(stage.candidate_kind, "stage.candidate_kind")
    candidate = resolve(place, config.model, "candidate", kind=kind)
    kind = kind_named(stage.reference_kind, "stage.reference_kind")
    reference_place = Path(stage.reference).expanduser() if stage.reference else None
    reference = resolve(reference_place, config.model, "reference", candidate, kind)
    for side in (candidate, reference):
        if side.artifact is not None:
            echo(side.artifact.line(f"stage.{side.role}"))
    examination = Examination(candidate, reference, config, stage)
    steps: list[StepResult] = []
    for number, name in enumerate(ORDER, start=1):
        if reason := examination.skip(name, steps):
            echo(f"[{number}/7] {name}: {reason}")
            continue
        echo(f"[{number}/7] {name}")
        result = getattr(examination, name)(steps)
        for line in result.lines:
            echo(f"  {line}")
        steps.append(result)
    output = Path(stage.output).expanduser() if stage.output else folder / "mended"
    command = mending(place, reference.place, config.model.name, output)
    verdict = conclude(candidate, reference, steps, examination.tried, command)
    echo(f"[7/7] verdict\n  {verdict.line}")
    facts: dict[str, Any] = {
        "candidate": str(place),
        "reference": str(reference.place or reference.family and reference.family.name or "its own record"),
        "command": command,
    }
    if not verdict.agrees and stage.fix:
        facts["mended"] = mended(output, examination, verdict)
    conclusion(config, folder, examination, verdict, steps, facts, started)


def mended(output: Path, examination: Examination, verdict: Diagnosis) -> dict[str, Any]:
    """Write the mended folder; what proved it."""
    assembly, left = repair(
        output, examination.candidate, examination.reference, verdict.findings, examination.called(), examination.prove
    )  # fmt: skip
    for finding in left:
        echo(f"  left as it is, for want of a reference: {finding.line()}")
    proof = assembly.verify or VerifyRecord("skipped")
    echo(f"  mended: {output} ({proof.line})")
    return {"where": str(output), **asdict(proof), "left": [finding.place for finding in left]}


def conclusion(
    config: Config[DiagnoseStage],
    folder: Path,
    examination: Examination,
    verdict: Diagnosis,
    steps: list[StepResult],
    facts: dict[str, Any],
    started: float,
) -> None:
    """Write what was found where people look for it; :class:`QualityGateError` when there is a fault."""
    found = as_json(verdict, steps, **facts)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "diagnosis.json", found)
    page = write_page(folder, found, examination.pictures())
    columns = ["rung", "component", "field or tensor", "kind", "confidence", "why"]
    rows = [[one.rung, one.component, one.name, one.kind, one.confidence, one.why] for one in verdict.findings]
    with open_tracker(config, "diagnose", folder) as tracker:
        tracker.table("diagnose/findings", columns, rows)
        tracker.log(0, {"diagnose/findings": float(len(rows)), **examination.numbers()})
        for name, path in page.pictures.items():
            tracker.image(0, f"diagnose/{name}", path)
    summary = "agrees" if verdict.agrees else verdict.line
    inputs = {"candidate": facts["candidate"], "reference": facts["reference"]}
    record_stage(
        folder, "diagnose", config, inputs, {"summary": summary, "where": str(page.path), **facts}, started=started
    )
    echo(f"diagnosis: {folder / 'diagnosis.json'}\npage:      {page.path}")
    if not verdict.agrees:
        hint = f"Mended: {facts['mended']['where']}" if "mended" in facts else f"To mend it: {facts['command']}"
        raise QualityGateError(verdict.line, hint)
