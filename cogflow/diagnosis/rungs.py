"""Step 3, rungs: the panel on the candidate's samples, against how they should look, prompt by prompt from the same noise."""

from __future__ import annotations

from cogflow.diagnosis.finding import Finding, StepResult
from cogflow.diagnosis.render import Rendered
from cogflow.diagnosis.side import Side
from cogflow.diagnosis.swaps import psnr, shown
from cogflow.sharpness.panel import CHANNELS
from cogflow.sharpness.verdict import compare

TOLD = 4  # channels that changed most
BY_EYE = 60.0
"""dB from which frames differ by rounding alone, and the panel is not asked what it would call that."""


def compare_rungs(candidate: Side, found: Rendered | None, goal: Rendered, failed: str) -> StepResult:
    """What the panel calls the candidate's samples, at the rung on which they stand."""
    if found is None:
        why = f"The pipeline {failed}."
        return StepResult(
            "rungs", [Finding("rungs", "pipeline", "broken", rung=candidate.rung, confidence=0.9, why=why)], [why], {"psnr": 0.0}
        )
    overall = psnr(found, goal)
    verdict = compare(found.panels, goal.panels)
    moved = sorted((name for name in CHANNELS if name in verdict.changes), key=lambda name: -abs(verdict.changes[name].z))[:TOLD]
    lines = [f"rung {candidate.rung}: {len(goal.frames)} samples against how they should look: {shown(overall)}"]
    changes = {name: verdict.changes[name].size for name in moved}
    kinds = [finding.kind for finding in verdict.findings if finding.level == "alarm"] if overall < BY_EYE else []
    if overall < BY_EYE:
        lines.append(", ".join(f"{name} {size:+.3g}" for name, size in changes.items()))
        lines += [finding.line() for finding in verdict.findings if finding.level == "alarm"]
    findings = [
        Finding("rungs", "pipeline", kind, rung=candidate.rung, confidence=0.3, why="The samples look so.", candidate=changes)
        for kind in kinds
    ]
    return StepResult("rungs", findings, lines, {"psnr": overall, "kinds": kinds, "changes": changes, "rung": candidate.rung})
