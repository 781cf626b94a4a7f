"""Step 3, rungs: compare the metrics of the candidate's samples with those of the expected samples.

Both are rendered from the same prompts and the same noise.
"""

from __future__ import annotations

from cogflow.diagnosis.diagnosis_input import DiagnosisInput
from cogflow.diagnosis.finding import DiagnosisFinding, StepResult
from cogflow.diagnosis.rendering import Rendered
from cogflow.diagnosis.swaps import format_psnr, mean_psnr
from cogflow.sharpness.metrics import METRICS
from cogflow.sharpness.verdict import compare

REPORTED_METRICS = 4  # the metrics that changed most
BY_EYE = 60.0
"""PSNR in dB from which frames differ by rounding alone. From there on the metrics are not classified as defects."""
LOST = ("soft", "smeared", "frozen", "identical", "black", "non_finite")
"""Defects that no style explains: training lost something. Contrast, colour and grain may come from the clips."""


def compare_trainings(found: Rendered, other: Rendered) -> StepResult:
    """Compare the samples of one training with those of another, prompt by prompt, at rung 4.

    Their contents may differ as takes of one content do.
    """
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
    """Return the defects of the candidate's samples, compared with the expected samples, at the candidate's rung."""
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
    )[:REPORTED_METRICS]
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
