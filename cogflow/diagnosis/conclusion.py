"""Step 7, verdict: weigh the findings of all steps, rule out sound components, and repair the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cogflow.assemble.components import STEMS, override_settings
from cogflow.assemble.consistency import check_components
from cogflow.assemble.pipeline_folder import PipelinePlan, write_pipeline
from cogflow.config.command import SettingValue, options
from cogflow.config.command import command as build_command
from cogflow.config.config import Config
from cogflow.config.diagnose_settings import DiagnoseStage
from cogflow.diagnosis.diagnosis_input import DiagnosisInput
from cogflow.diagnosis.finding import (
    FAULTY,
    DiagnosisFinding,
    StepResult,
    SwapsResult,
    SwapTrial,
    WeightsResult,
)
from cogflow.errors import PipelineError
from cogflow.files.record_io import JsonValue
from cogflow.models.code_check import CONFIGS
from cogflow.records.pipeline_records import PipelineSampling, RepairedFolder, VerifyRecord

VISIBLE_CONFIDENCE = 0.98
"""Confidence of a fault that changes the samples by itself."""

INVISIBLE_CONFIDENCE = 0.5
"""Lowest confidence of a known fault that does not change the samples of these prompts."""

EVIDENCE_BONUS = 0.1
"""Added to the confidence of a finding that the weights' own evidence confirms."""


@dataclass(frozen=True)
class Conclusion:
    """``findings``: faults, the most certain first. ``notes``: differences without an effect.

    ``ruled_out``: components that were compared and are sound. ``verdict``: all of it in one line.
    """

    findings: list[DiagnosisFinding]
    notes: list[DiagnosisFinding]
    ruled_out: list[str]
    verdict: str

    @property
    def agrees(self) -> bool:
        return not self.findings


def conclude(
    candidate: DiagnosisInput, reference: DiagnosisInput, steps: Sequence[StepResult], command: str
) -> Conclusion:
    """Weigh what the steps found. ``command`` repairs all of it."""
    swaps = next((step for step in steps if isinstance(step, SwapsResult)), None)
    trials = {trial.suspect.location: trial for trial in swaps.trials} if swaps is not None else {}
    evidence = {one.location: one for step in steps if step.name == "evidence" for one in step.findings}
    weighed: dict[str, DiagnosisFinding] = {}
    for finding in (finding for step in steps for finding in step.findings if _concerns_a_cause(step, finding)):
        judged = weigh(finding, trials, evidence)
        judged = replace(judged, fix=fix_of(judged, reference, command), rung=judged.rung or candidate.rung)
        known = weighed.get(judged.location)
        if known is None or known.confidence < judged.confidence:
            weighed[judged.location] = judged
    kept = _without_consequences(list(weighed.values()))
    faults = sorted((one for one in kept if one.faulty), key=lambda finding: -finding.confidence)
    if not faults and swaps is not None and swaps.unexplained:
        why = "The samples are not as they should be, and no single difference explains it."
        faults = [DiagnosisFinding("swaps", "pipeline", "unknown", rung=candidate.rung, confidence=FAULTY, why=why)]
    ruled_out = sound_components(candidate, steps, faults)
    notes = [one for one in kept if not one.faulty]
    return Conclusion(faults, notes, ruled_out, verdict_line(candidate, faults, ruled_out))


def _concerns_a_cause(step: StepResult, finding: DiagnosisFinding) -> bool:
    """Return whether a finding names a cause. Swaps only weigh causes, and rungs describe how samples look."""
    if step.name == "swaps":
        return False
    return not (step.name == "rungs" and finding.component == "pipeline" and finding.kind != "broken")


def _without_consequences(findings: list[DiagnosisFinding]) -> list[DiagnosisFinding]:
    """Return the findings without details of components that are faulty as a whole."""
    whole = {
        one.component for one in findings if one.faulty and not one.name and one.kind in ("reset", "replaced", "broken")
    }
    return [one for one in findings if not (one.component in whole and one.name)]


def weigh(
    finding: DiagnosisFinding, trials: Mapping[str, SwapTrial], evidence: Mapping[str, DiagnosisFinding]
) -> DiagnosisFinding:
    """Return the finding with the confidence that the swaps and the weights' own evidence give it."""
    if not finding.faulty:
        return finding
    trial = trials.get(finding.location) or (trials.get(finding.component) if finding.of_weights else None)
    confidence, why = finding.confidence, finding.why
    if trial is not None and trial.visible:
        confidence = VISIBLE_CONFIDENCE
        defects = f", {', '.join(trial.defects)}" if trial.defects else ""
        why += f" Alone it changes the samples: {trial.failed or f'{trial.alone:.1f} dB'}{defects}."
    elif trial is not None:
        confidence = max(INVISIBLE_CONFIDENCE, round(0.6 * confidence, 2))
        why += f" On these prompts it does not show ({trial.alone:.0f} dB)."
    if finding.step != "evidence" and finding.location in evidence:
        confidence = min(0.99, confidence + EVIDENCE_BONUS)
        why += " " + evidence[finding.location].why
    return replace(finding, confidence=round(confidence, 2), why=why.strip())


def fix_of(finding: DiagnosisFinding, reference: DiagnosisInput, command: str) -> str:
    """Return the option that corrects the field or takes the component from the reference, else the whole command."""
    if finding.kind == "config" and finding.fix:
        return finding.fix
    part = reference.parts.get(finding.component)
    return options({f"stage.{finding.component}": part.folder}) if part is not None and part.class_name else command


def sound_components(
    candidate: DiagnosisInput, steps: Sequence[StepResult], faults: Sequence[DiagnosisFinding]
) -> list[str]:
    """Return the components whose weights were compared without a fault."""
    compared = {name for step in steps if isinstance(step, WeightsResult) for name in step.compared}
    faulty = {fault.component for fault in faults if fault.of_weights}
    sound = [name for name in STEMS if name in compared and name in candidate.parts and name not in faulty]
    return [f"the {name.replace('_', ' ')}'s weights" for name in sound]


def verdict_line(candidate: DiagnosisInput, faults: Sequence[DiagnosisFinding], ruled_out: Sequence[str]) -> str:
    """Return the verdict in one line."""
    if not faults:
        return "Nothing wrong was found."
    names = [
        f"{one.location} ({one.candidate} instead of {one.reference})"
        if one.kind == "config"
        else f"{one.location} ({one.kind})"
        for one in faults
    ]
    rung = candidate.rung if faults[0].rung is None else faults[0].rung
    line = f"Faulty, at rung {rung}: {', '.join(names)}."
    return line + (f" Ruled out: {', '.join(ruled_out)}." if ruled_out else "")


def repair_command(config: Config[DiagnoseStage], candidate: Path, output: Path) -> str:
    """Return the command that diagnoses ``candidate`` again with the same reference, and writes a repaired folder."""
    stage, model = config.stage, config.model
    kinds = {"stage.candidate_kind": stage.candidate_kind, "stage.reference_kind": stage.reference_kind}
    settings: dict[str, SettingValue | None] = {
        "stage.candidate": candidate,
        "stage.reference": stage.reference,
        **{key: kind for key, kind in kinds.items() if kind != "auto"},
        "model": model.name if stage.reference is None else None,
        "model.path": model.path,
        "stage.fix": True,
        "stage.output": output,
    }
    return build_command("diagnose", settings, config.run)


def repair(
    output: Path,
    candidate: DiagnosisInput,
    reference: DiagnosisInput,
    faults: Sequence[DiagnosisFinding],
    sampling: PipelineSampling,
    verify: Callable[[Path], VerifyRecord],
) -> RepairedFolder:
    """Write ``output``: the candidate with faulty fields corrected and faulty components taken from the reference.

    ``sampling``: how to sample it, for the card. ``verify`` gets the unpublished folder, and raises QualityGateError
    when it is not repaired. Faults of the dtype that no reference can repair are left. Raises :class:`PipelineError`
    for weights that only a reference can repair, when there is none.
    """
    components = dict(candidate.parts)
    fields: dict[str, dict[str, JsonValue]] = {}
    left: list[DiagnosisFinding] = []
    for component in dict.fromkeys(fault.component for fault in faults):
        own = [fault for fault in faults if fault.component == component]
        wrong_fields = {fault.name: fault.reference for fault in own if fault.kind == "config"}
        only_fields = len(wrong_fields) == len(own)
        if component == "sampling":
            sampling = replace(sampling, **wrong_fields)  # type: ignore[arg-type]
        elif only_fields and component in components and component != "tokenizer":
            fields[component] = wrong_fields
        elif component in reference.parts:
            components[component] = reference.parts[component]
        elif all(fault.kind in ("config", "dtype") for fault in own):
            fields[component] = wrong_fields
            left += [fault for fault in own if fault.kind == "dtype"]
        else:
            raise PipelineError(
                f"{own[0].location} ({own[0].kind}) can only be repaired from a reference, and there is none.",
                "Give stage.reference=FOLDER, a pipeline folder or a run that is known to be right.",
            )
    if missing := set(CONFIGS) - set(components):
        raise PipelineError(
            f"The repaired pipeline would have no {', '.join(sorted(missing))}.", "Give stage.reference=FOLDER."
        )
    components = override_settings(components, fields)
    checks = check_components(components, [], force=[fault.location for fault in left])
    assembly = write_pipeline(output, PipelinePlan(components, checks, sampling), verify)
    return RepairedFolder(str(output), assembly.verify or VerifyRecord("skipped"), [fault.location for fault in left])
