"""Step 7, the verdict: what is guilty, how sure that is, who is acquitted, and the command that mends it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogflow.assemble.components import STEMS
from cogflow.diagnosis.diagnosis_input import DiagnosisInput
from cogflow.diagnosis.finding import FAULTY, DiagnosisFinding, StepResult
from cogflow.diagnosis.swaps import Tried

SEEN, UNSEEN = 0.98, 0.5
"""Confidence of what shows in the picture; the least of what is known to be wrong and does not show on these prompts."""
SAID_TWICE = 0.1  # added where the weights' own evidence agrees


@dataclass(frozen=True)
class Diagnosis:
    """``findings``: faults, the surest first; ``notes``: differences that harm nothing; ``acquitted``: what was looked at and is sound."""

    findings: list[DiagnosisFinding]
    notes: list[DiagnosisFinding]
    acquitted: list[str]
    line: str

    @property
    def agrees(self) -> bool:
        return not self.findings


def conclude(
    candidate: DiagnosisInput,
    reference: DiagnosisInput,
    steps: Sequence[StepResult],
    tried: Sequence[Tried],
    command: str,
) -> Diagnosis:
    """Weigh what the steps found. ``command`` mends all of it."""
    by_name = {step.name: step for step in steps}
    shows = {one.suspect.name: one for one in tried}
    evidence = {one.place: one for one in by_name["evidence"].findings} if "evidence" in by_name else {}
    weighed: dict[str, DiagnosisFinding] = {}
    for step in steps:
        if step.name == "swaps":
            continue
        for finding in step.findings:
            if step.name == "rungs" and finding.component == "pipeline" and finding.kind != "broken":
                continue  # how it looks; why is for the other steps to say
            judged = weigh(finding, shows, evidence)
            fixed = replace(judged, fix=fix_of(judged, reference, command), rung=judged.rung or candidate.rung)
            if judged.place not in weighed or weighed[judged.place].confidence < judged.confidence:
                weighed[judged.place] = fixed
    whole = {
        one.component
        for one in weighed.values()
        if one.guilty and not one.name and one.kind in ("reset", "replaced", "broken")
    }
    kept = [one for one in weighed.values() if not (one.component in whole and one.name)]
    guilty = sorted((one for one in kept if one.guilty), key=lambda one: -one.confidence)
    swaps = by_name.get("swaps")
    if not guilty and swaps is not None and swaps.facts["psnr"] < 45 and not swaps.facts["healed_by"]:
        why = "The samples are not as they should be, and no single difference explains it."
        guilty = [DiagnosisFinding("swaps", "pipeline", "unknown", rung=candidate.rung, confidence=FAULTY, why=why)]
    notes = [one for one in kept if not one.guilty]
    acquitted = rule_out(candidate, steps, guilty)
    return Diagnosis(guilty, notes, acquitted, told(candidate, guilty, acquitted))


def weigh(
    finding: DiagnosisFinding, shows: Mapping[str, Tried], evidence: Mapping[str, DiagnosisFinding]
) -> DiagnosisFinding:
    """Its confidence after what the swaps and the weights' own evidence say."""
    if finding.confidence < FAULTY:
        return finding
    tried = shows.get(finding.place) or (
        shows.get(finding.component) if finding.is_tensor or not finding.name else None
    )
    confidence = finding.confidence
    why = finding.why
    if tried is not None and tried.harms:
        confidence = SEEN
        what = f", {', '.join(tried.kinds)}" if tried.kinds else ""
        why += f" Alone it does this to the samples: {tried.failed or f'{tried.harm:.1f} dB'}{what}."
    elif tried is not None:
        confidence = max(UNSEEN, round(0.6 * confidence, 2))
        why += f" On these prompts it does not show ({tried.harm:.0f} dB)."
    if finding.step != "evidence" and finding.place in evidence:
        confidence = min(0.99, confidence + SAID_TWICE)
        why += " " + evidence[finding.place].why
    return replace(finding, confidence=round(confidence, 2), why=why.strip())


def fix_of(finding: DiagnosisFinding, reference: DiagnosisInput, command: str) -> str:
    """Words for stage=assemble: the field set right, or the component from the reference; else the command that mends everything."""
    if finding.kind == "config" and finding.fix:
        return finding.fix
    part = reference.parts.get(finding.component)
    return f"stage.{finding.component}={part.folder}" if part is not None and part.class_name else command


def rule_out(candidate: DiagnosisInput, steps: Sequence[StepResult], guilty: Sequence[DiagnosisFinding]) -> list[str]:
    """Components whose weights were compared and are sound."""
    weights = next((step.facts for step in steps if step.name == "weights"), {})
    accused = {one.component for one in guilty if one.is_tensor or not one.name}
    return [
        f"the {name.replace('_', ' ')}'s weights"
        for name in STEMS
        if name in weights and name in candidate.parts and name not in accused
    ]


def told(candidate: DiagnosisInput, guilty: Sequence[DiagnosisFinding], acquitted: Sequence[str]) -> str:
    """One paragraph."""
    if not guilty:
        return "Nothing wrong was found."
    names = [
        f"{one.place} ({one.candidate} instead of {one.reference})"
        if one.kind == "config"
        else f"{one.place} ({one.kind})"
        for one in guilty
    ]
    line = f"Guilty, at rung {guilty[0].rung if guilty[0].rung is not None else candidate.rung}: {', '.join(names)}."
    return line + (f" Acquitted: {', '.join(acquitted)}." if acquitted else "")


def mending(candidate: Path, reference: Path | None, model: str, output: Path) -> str:
    """The command that writes the mended folder."""
    words = ["python", "-m", "cogflow", "stage=diagnose", f"stage.candidate={candidate}"]
    words += [f"stage.reference={reference}"] if reference is not None else [f"model={model}"]
    return shlex.join([*words, "stage.fix=true", f"stage.output={output}"])


def as_json(verdict: Diagnosis, steps: Sequence[StepResult], **facts: Any) -> dict[str, Any]:
    """diagnosis.json."""
    return {
        "agrees": verdict.agrees,
        "verdict": verdict.line,
        "findings": [finding.as_dict() for finding in verdict.findings],
        "notes": [finding.as_dict() for finding in verdict.notes],
        "acquitted": verdict.acquitted,
        "steps": {step.name: {"lines": step.lines, **step.facts} for step in steps},
        **facts,
    }
