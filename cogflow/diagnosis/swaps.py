"""Step 4, swaps: find which differences change the samples, and the smallest set of them whose exchange repairs the
samples.

Each suspect (a component, or one field of its config) is tried in two ways: the target with the candidate's suspect
shows its effect alone, and the candidate with the target's suspect shows what remains. The target is how the candidate
should look: the reference, or for a finetune of the reference's model, the candidate's transformer with everything
else from the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from cogflow.diagnosis.finding import DiagnosisFinding, Suspect, SwapsResult, SwapTrial
from cogflow.diagnosis.rendering import Mix, Rendered, Renderer, swapped
from cogflow.sharpness.psnr import IDENTICAL_PSNR, frames_psnr
from cogflow.sharpness.verdict import compare

SAME_PSNR = 45.0
"""PSNR in dB between samples of one pipeline whose weights are stored in two dtypes: bf16 gives about 48 on the tiny
model.

Below it something else differs, too. A wrong SNR shift or spacing gives 37 to 40, a wrong scaling factor 17.
"""

MAX_COMBINED = 6
"""Suspects whose pairs and larger combinations are tried, those with the largest effect."""


def suspects_of(findings: Sequence[DiagnosisFinding], changed: Sequence[str]) -> list[Suspect]:
    """Return the components in ``changed`` and the config fields that the findings name."""
    components = [Suspect(name) for name in changed]
    fields = [
        Suspect(finding.component, finding.name)
        for finding in findings
        if finding.step == "facts" and finding.kind == "config" and finding.name
    ]
    # A tokenizer's fields have no effect on the loaded tokenizer, and another sampler is no fault.
    usable = [suspect for suspect in fields if suspect.component != "tokenizer" and suspect.field != "_class_name"]
    return list(dict.fromkeys([*components, *usable]))


class SwapTrials:
    """Trials of suspects between a candidate and its target. ``advance`` is called with the name of each trial."""

    def __init__(self, candidate: Mix, target: Mix, render: Renderer, advance: Callable[[str], None]) -> None:
        self.candidate, self.target, self.render, self.advance = candidate, target, render, advance
        self.goal = render(target)

    def run(self, suspects: Sequence[Suspect]) -> SwapsResult:
        """Try each suspect, and then combinations; the findings are the smallest set that repairs the samples."""
        samples, failed = try_rendering(self.render, self.candidate)
        psnr = mean_psnr(samples, self.goal)
        defects = defects_of(samples, self.goal)
        trials = [self._try(suspect) for suspect in suspects]
        repaired_by = self._smallest_repair(trials) if psnr < SAME_PSNR else []
        findings = [
            DiagnosisFinding(
                step="swaps",
                component=suspect.component,
                kind="shows",
                name=suspect.field,
                confidence=0.9,
                why="With the target's value the samples are as they should be.",
            )
            for suspect in repaired_by
        ]
        difference = ", ".join([format_psnr(psnr), *defects]) + (f" {failed}" if failed else "")
        lines = [f"candidate against the target: {difference}", *map(_trial_line, trials)]
        if psnr < SAME_PSNR:
            names = ", ".join(suspect.location for suspect in repaired_by) or "nothing that was tried"
            lines.append(f"repaired by: {names}")
        return SwapsResult(
            name="swaps",
            findings=findings,
            lines=lines,
            measurements=_measurements(psnr, defects, repaired_by, trials),
            psnr=psnr,
            unexplained=psnr < SAME_PSNR and not repaired_by,
            repaired_by=repaired_by,
            trials=trials,
        )

    def _try(self, suspect: Suspect) -> SwapTrial:
        self.advance(suspect.location)
        alone, failed = try_rendering(self.render, self._exchange(self.target, [suspect], self.candidate))
        without, _ = try_rendering(self.render, self._exchange(self.candidate, [suspect], self.target))
        psnr = mean_psnr(alone, self.goal)
        return SwapTrial(
            suspect=suspect,
            alone=psnr,
            without=mean_psnr(without, self.goal),
            defects=defects_of(alone, self.goal),
            visible=bool(failed) or psnr < SAME_PSNR,
            failed=failed,
        )

    def _smallest_repair(self, trials: Sequence[SwapTrial]) -> list[Suspect]:
        """Return the smallest set whose exchange makes the candidate's samples the target's; empty when none does."""
        visible = sorted((trial for trial in trials if trial.visible), key=lambda trial: trial.alone)[:MAX_COMBINED]
        suspects = [trial.suspect for trial in visible]
        for size in range(1, len(suspects) + 1):
            for chosen in combinations(suspects, size):
                self.advance(", ".join(suspect.location for suspect in chosen))
                samples, _ = try_rendering(self.render, self._exchange(self.candidate, chosen, self.target))
                if mean_psnr(samples, self.goal) >= SAME_PSNR:
                    return list(chosen)
        return []

    @staticmethod
    def _exchange(mix: Mix, suspects: Sequence[Suspect], other: Mix) -> Mix:
        for suspect in suspects:
            mix = swapped(mix, suspect.component, suspect.field, other)
        return mix


def _trial_line(trial: SwapTrial) -> str:
    alone = trial.failed or format_psnr(trial.alone)
    defects = f" ({', '.join(trial.defects)})" if trial.defects else ""
    return f"{trial.suspect.location}: alone in the target {alone}, without it {format_psnr(trial.without)}{defects}"


def _measurements(
    psnr: float, defects: list[str], repaired_by: list[Suspect], trials: list[SwapTrial]
) -> dict[str, Any]:
    return {
        "psnr": psnr,
        "defects": defects,
        "repaired_by": [suspect.location for suspect in repaired_by],
        "trials": [{**asdict(trial), "suspect": trial.suspect.location} for trial in trials],
    }


def try_rendering(render: Renderer, mix: Mix) -> tuple[Rendered | None, str]:
    """Return the samples of ``mix``, or ``None`` and the error of diffusers: a component may fail to load."""
    try:
        return render(mix), ""
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, NotImplementedError) as error:
        return None, f"does not load or run: {str(error).splitlines()[0][:160]}"


def mean_psnr(found: Rendered | None, goal: Rendered) -> float:
    """Return the mean PSNR over the samples in dB, at most 100; 0 when ``found`` is missing or of another shape."""
    if found is None:
        return 0.0
    values = []
    for name, expected in goal.frames.items():
        frames = found.frames.get(name)
        if frames is None or frames.shape != expected.shape:
            return 0.0
        values.append(frames_psnr(frames, expected))
    return round(sum(values) / len(values), 2)


def defects_of(found: Rendered | None, goal: Rendered) -> list[str]:
    """Return the defects that the sharpness metrics find in ``found`` against ``goal``, sample by sample."""
    if found is None:
        return []
    return [finding.defect for finding in compare(found.metrics, goal.metrics).findings if finding.level == "alarm"]


def format_psnr(value: float) -> str:
    return "equal" if value >= IDENTICAL_PSNR else f"{value:.1f} dB"
