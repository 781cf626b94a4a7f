"""Step 4, swaps: which of the differences show in the picture, and the smallest set of them that heals it.

Every suspect (a component's files, or one field of its config) is tried alone both ways: the reference with the candidate's, which shows
what it does by itself, and the candidate without it. Where the candidate is a finetune of the reference's model, the reference is
the candidate's transformer with everything else from the reference: what it gives there is how it should look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from cogflow.diagnosis.finding import DiagnosisFinding, StepResult
from cogflow.diagnosis.rendering import SAMPLING, Mix, Rendered, Renderer, swapped
from cogflow.sharpness.verdict import compare

SAME = 45.0
"""dB between samples of one pipeline whose weights were stored in another dtype: bf16 gives about 48 on the tiny model. Below, something
else differs, too. A wrong SNR shift or spacing gives 37 to 40, a wrong scaling factor 17."""
MOST = 6  # suspects of which pairs and threes are tried


@dataclass(frozen=True)
class Suspect:
    """A field of a component's config, or with an empty ``field`` all of the component."""

    component: str
    field: str = ""

    @property
    def name(self) -> str:
        return f"{self.component}.{self.field}" if self.field else self.component


@dataclass(frozen=True)
class Tried:
    """What one suspect does. ``harm``: dB of the reference with it; ``without``: dB of the candidate without it; both against the target.

    ``kinds``: what the panel calls the reference with it, against the target. ``failed``: what loading said.
    """

    suspect: Suspect
    harm: float
    without: float
    kinds: list[str]
    failed: str = ""

    @property
    def harms(self) -> bool:
        return bool(self.failed) or self.harm < SAME


def suspects_of(findings: Sequence[DiagnosisFinding], different: Sequence[str]) -> list[Suspect]:
    """What the steps before came upon: fields by themselves, components whose weights differ as a whole."""
    fields = [
        Suspect(one.component, one.name)
        for one in findings
        if one.step == "facts" and one.kind == "config" and one.name
    ]
    fields = [one for one in fields if one.component != "tokenizer" and one.field != "_class_name"]
    whole = [Suspect(name) for name in different]
    return list(dict.fromkeys([*whole, *fields]))


def try_swaps(
    candidate: Mix,
    reference: Mix,
    suspects: Sequence[Suspect],
    render: Renderer,
    *,
    target: Mix,
    advance: Callable[[str], None],
) -> tuple[StepResult, list[Tried]]:
    """Render what it takes; ``target`` is how the candidate should look. The findings name the suspects that show in the picture."""
    goal = render(target)
    base, failed = attempt(render, candidate)
    overall = psnr(base, goal)
    kinds = kinds_of(base, goal)
    tried = []
    for suspect in suspects:
        advance(suspect.name)
        alone, failure = attempt(render, swapped(target, suspect.component, suspect.field, candidate))
        healed, _ = attempt(render, swapped(candidate, suspect.component, suspect.field, target))
        tried.append(Tried(suspect, psnr(alone, goal), psnr(healed, goal), kinds_of(alone, goal), failure))
    healing = smallest(candidate, target, tried, render, goal, advance) if overall < SAME else []
    lines = [
        f"candidate against how it should look: {shown(overall)}{', ' + ', '.join(kinds) if kinds else ''}{failed and ' ' + failed}"
    ]
    lines += [
        f"{one.suspect.name}: alone in the reference {one.failed or shown(one.harm)}, without it {shown(one.without)}"
        + (f" ({', '.join(one.kinds)})" if one.kinds else "")
        for one in tried
    ]
    if overall < SAME:
        lines.append(f"healed by: {', '.join(one.name for one in healing) or 'nothing that was tried'}")
    findings = [
        DiagnosisFinding(
            "swaps",
            one.component,
            "shows",
            one.field,
            rung=None,
            confidence=0.9,
            why="Without it the samples are as they should be.",
        )
        for one in healing
    ]
    facts: dict[str, Any] = {
        "psnr": overall, "kinds": kinds, "healed_by": [one.name for one in healing],
        "tried": [
            {"suspect": one.suspect.name, "alone": one.harm, "without": one.without, "kinds": one.kinds, "failed": one.failed}
            for one in tried
        ],
    }  # fmt: skip
    return StepResult("swaps", findings, lines, facts), tried


def smallest(
    candidate: Mix,
    target: Mix,
    tried: Sequence[Tried],
    render: Renderer,
    goal: Rendered,
    advance: Callable[[str], None],
) -> list[Suspect]:
    """The smallest set whose replacement makes the candidate's samples the target's; empty when not even all of them do."""
    guilty = sorted((one for one in tried if one.harms), key=lambda one: one.harm)[:MOST]
    for size in range(1, len(guilty) + 1):
        for chosen in combinations(guilty, size):
            mix = candidate
            for one in chosen:
                mix = swapped(mix, one.suspect.component, one.suspect.field, target)
            advance(", ".join(one.suspect.name for one in chosen))
            healed, _ = attempt(render, mix)
            if psnr(healed, goal) >= SAME:
                return [one.suspect for one in chosen]
    return []


def attempt(render: Renderer, mix: Mix) -> tuple[Rendered | None, str]:
    """The samples of a mix, or what diffusers said of it: a part that does not load is a finding, not an end."""
    try:
        return render(mix), ""
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, NotImplementedError) as error:
        return None, f"does not load or run: {str(error).splitlines()[0][:160]}"


def psnr(found: Rendered | None, goal: Rendered) -> float:
    """Mean over the samples in dB, at most 100; 0 for what could not be rendered."""
    if found is None:
        return 0.0
    values = []
    for name, expected in goal.frames.items():
        frames = found.frames.get(name)
        if frames is None or frames.shape != expected.shape:
            return 0.0
        error = float(torch.where(frames.isfinite(), frames - expected, 1.0).double().square().mean())
        values.append(100.0 if error == 0 else min(100.0, -10 * math.log10(error)))
    return round(sum(values) / len(values), 2)


def kinds_of(found: Rendered | None, goal: Rendered) -> list[str]:
    """What the panel calls it; exact pairs, so that rounding is the null."""
    if found is None:
        return []
    return [finding.defect for finding in compare(found.panels, goal.panels).findings if finding.level == "alarm"]


def shown(value: float) -> str:
    return "equal" if value >= 100 else f"{value:.1f} dB"


__all__ = [
    "SAMPLING",
    "Suspect",
    "Tried",
    "attempt",
    "kinds_of",
    "psnr",
    "shown",
    "smallest",
    "suspects_of",
    "try_swaps",
]
