"""Step 3, rungs: the panel on the candidate's samples, against how they should look, prompt by prompt from the same noise."""

from __future__ import annotations

from cogflow.diagnosis.diagnosis_input import DiagnosisInput
from cogflow.diagnosis.finding import DiagnosisFinding, StepResult
from cogflow.diagnosis.rendering import Rendered
from cogflow.diagnosis.swaps import format_psnr, mean_psnr
from cogflow.sharpness.metrics import METRICS
from cogflow.sharpness.verdict import compare

TOLD = 4  # metrics that changed most
BY_EYE = 60.0
"""dB from which frames differ by rounding alone, and the panel is not asked what it would call that."""


LOST = ("soft", "smeared", "frozen", "identical", "black", "non_finite")
"""Kinds that no style is: training lost something. Contrast, colour and grain may be what the clips have."""


def compare_trainings(found: Rendered, other: Rendered) -> StepResult:
    """Samples of one training against those of another, prompt by prompt: rung 4. Contents may differ as takes of one content do."""
    why = "Its samples against the reference's: {}. Training did that, not the pipeline around it."
    findings = [
        DiagnosisFinding(
            "rungs",
            "transformer",
            one.defect,
            rung=4,
            confidence=0.6 if one.defect in LOST else 0.3,
            why=why.format(one.line()),
        )
        for one in compare(found.metrics, other.metrics).findings
        if one.level == "alarm"
    ]
    lines = [f"rung 4: against the reference's own training: {finding.kind}, {finding.why}" for finding in findings]
    return StepResult("rungs", findings, lines or ["rung 4: as sharp as the reference's own training"], {})


def compare_rungs(candidate: DiagnosisInput, found: Rendered | None, goal: Rendered, failed: str) -> StepResult:
    """What the panel calls the candidate's samples, at the rung on which they stand."""
    if found is None:
        why = f"The pipeline {failed}."
        return StepResult(
            "rungs",
            [DiagnosisFinding("rungs", "pipeline", "broken", rung=candidate.rung, confidence=0.9, why=why)],
            [why],
            {"psnr": 0.0},
        )
    overall = mean_psnr(found, goal)
    verdict = compare(found.metrics, goal.metrics)
    moved = sorted(
        (name for name in METRICS if name in verdict.changes), key=lambda name: -abs(verdict.changes[name].z)
    )[:TOLD]
    lines = [f"rung {candidate.rung}: {len(goal.frames)} samples against how they should look: {format_psnr(overall)}"]
    changes = {name: verdict.changes[name].size for name in moved}
    kinds = [finding.defect for finding in verdict.findings if finding.level == "alarm"] if overall < BY_EYE else []
    if overall < BY_EYE:
        lines.append(", ".join(f"{name} {size:+.3g}" for name, size in changes.items()))
        lines += [finding.line() for finding in verdict.findings if finding.level == "alarm"]
    findings = [
        DiagnosisFinding(
            "rungs",
            "pipeline",
            kind,
            rung=candidate.rung,
            confidence=0.3,
            why="The samples look so.",
            candidate=changes,
        )
        for kind in kinds
    ]
    return StepResult(
        "rungs", findings, lines, {"psnr": overall, "kinds": kinds, "changes": changes, "rung": candidate.rung}
    )
