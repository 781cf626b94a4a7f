"""stage=diagnose: find which component, field or tensor degrades a pipeline, and print or run the command that repairs
it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from cogflow.artifacts.identify import kind_named
from cogflow.config.config import Config
from cogflow.config.diagnose_settings import DiagnoseStage
from cogflow.diagnosis.conclusion import Conclusion, conclude, repair, repair_command
from cogflow.diagnosis.diagnosis_input import resolve
from cogflow.diagnosis.examination import STEPS, Examination
from cogflow.diagnosis.html_page import write_page
from cogflow.errors import QualityGateError
from cogflow.files.paths import run_folder
from cogflow.files.record_io import record_values, write_record
from cogflow.records.pipeline_records import DiagnosisRecord, RepairedFolder
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.tracking.html_report import record_stage
from cogflow.tracking.tracker import Tracker, open_tracker


@dataclass(frozen=True)
class Diagnosed:
    """Result of a diagnosis. ``place``: as the user named the candidate; ``not_checked``: steps left out, with the
    reason.
    """

    place: Path
    examination: Examination
    conclusion: Conclusion
    command: str
    not_checked: list[str]
    repaired: RepairedFolder | None = None


def run(config: Config[DiagnoseStage]) -> None:
    """Diagnose ``stage.candidate`` and write ``<run>/diagnosis.json`` and ``diagnosis.html``. Rank 0 works, the others
    wait.

    Raises :class:`QualityGateError` when a fault is found.
    """
    if ranks.is_main():
        started = time.time()
        report(config, diagnose(config), started)
    ranks.barrier()


def diagnose(config: Config[DiagnoseStage]) -> Diagnosed:
    """Run the steps, conclude, and with stage.fix=true repair the candidate."""
    stage, folder = config.stage, run_folder(config.run)
    place = Path(stage.candidate).expanduser() if stage.candidate else folder
    reference_place = Path(stage.reference).expanduser() if stage.reference else None
    kind = kind_named(stage.candidate_kind, "stage.candidate_kind")
    candidate = resolve(place, config.model, "candidate", kind=kind)
    kind = kind_named(stage.reference_kind, "stage.reference_kind")
    reference = resolve(reference_place, config.model, "reference", candidate, kind)
    for given in (candidate, reference):
        if given.artifact is not None:
            echo(given.artifact.line(f"stage.{given.role}"))
    examination = Examination(candidate, reference, config)
    not_checked = run_steps(examination)
    output = Path(stage.output).expanduser() if stage.output else folder / "repaired"
    command = repair_command(config, place, output)
    conclusion = conclude(candidate, reference, examination.steps, command)
    echo(f"[{len(STEPS) + 1}/{len(STEPS) + 1}] verdict\n  {conclusion.verdict}")
    repaired = None
    if stage.fix and not conclusion.agrees:
        repaired = repair(
            output,
            candidate,
            reference,
            conclusion.findings,
            examination.recorded_sampling(),
            examination.verify_repair,
        )
        for location in repaired.left:
            echo(f"  not repaired, because it needs a reference: {location}")
        echo(f"  repaired: {output} ({repaired.verify.line})")
    return Diagnosed(place, examination, conclusion, command, not_checked, repaired)


def run_steps(examination: Examination) -> list[str]:
    """Run every step that can run and is needed, and return the others with the reason."""
    not_checked: list[str] = []
    for number, name in enumerate(STEPS, start=1):
        reason = examination.skip_reason(name)
        echo(f"[{number}/{len(STEPS) + 1}] {name}" + (f": {reason}" if reason else ""))
        if reason:
            not_checked.append(f"{name}: {reason}")
            continue
        for line in examination.run_step(name).lines:
            echo(f"  {line}")
    return not_checked


def report(config: Config[DiagnoseStage], found: Diagnosed, started: float) -> None:
    """Write diagnosis.json, the page, the stage's record and the tracker's table; raise when there is a fault."""
    folder, conclusion = run_folder(config.run), found.conclusion
    record = diagnosis_record(found)
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / DiagnosisRecord.file_name, record)
    page = write_page(folder, record, found.examination.frames())
    columns = ["rung", "component", "field or tensor", "kind", "confidence", "why"]
    rows = [[one.rung, one.component, one.name, one.kind, one.confidence, one.why] for one in conclusion.findings]
    with open_tracker(config, "diagnose", folder) as tracker:
        tracker.table("diagnose/findings", columns, rows)
        tracker.log(0, {"diagnose/findings": float(len(rows)), **found.examination.metrics()})
        for name, path in page.pictures.items():
            tracker.image(0, f"diagnose/{name}", path)
        files = [folder / DiagnosisRecord.file_name, page.path]
        tracker.artifact("diagnosis", "report", files, uses=used_artifacts(tracker, found.examination))
    summary = "agrees" if conclusion.agrees else conclusion.verdict
    results = {"summary": summary, "where": str(page.path), "command": found.command}
    if found.repaired is not None:
        results["repaired"] = record_values(record)["repaired"]
    inputs = {"candidate": record.candidate, "reference": record.reference}
    record_stage(folder, "diagnose", config, inputs, results, started=started)
    echo(f"diagnosis: {folder / DiagnosisRecord.file_name}", f"page:      {page.path}")
    if not conclusion.agrees:
        hint = f"Repaired: {found.repaired.where}" if found.repaired else f"To repair it: {found.command}"
        raise QualityGateError(conclusion.verdict, hint)


def used_artifacts(tracker: Tracker, examination: Examination) -> list[str]:
    """Return the names of the artifacts that were compared; facts that a model declares are none."""
    names = []
    for given in (examination.candidate, examination.reference):
        if given.place is not None:
            transformer = given.parts.get("transformer")
            inside = transformer is not None and given.place.absolute() in transformer.folder.absolute().parents
            names.append(
                tracker.input(transformer.folder.parent if transformer and inside else given.place, given.role)
            )
    return names


def diagnosis_record(found: Diagnosed) -> DiagnosisRecord:
    """Return diagnosis.json."""
    examination, conclusion = found.examination, found.conclusion
    reference = examination.reference
    declared = reference.family.name if reference.family is not None else "its own record"
    return DiagnosisRecord(
        agrees=conclusion.agrees,
        verdict=conclusion.verdict,
        findings=[finding.record() for finding in conclusion.findings],
        notes=[finding.record() for finding in conclusion.notes],
        ruled_out=conclusion.ruled_out,
        steps={step.name: {"lines": step.lines, **step.measurements} for step in examination.steps},
        candidate=str(found.place),
        reference=str(reference.place or declared),
        command=found.command,
        checked=[step.name for step in examination.steps],
        not_checked=found.not_checked,
        repaired=found.repaired,
    )
