"""Step 2, weights: every tensor of the candidate against the reference's, and what a tensor that does not belong there really is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from cogflow.assemble.components import STEMS
from cogflow.diagnosis import tensor_origin
from cogflow.diagnosis.diagnosis_input import DiagnosisInput
from cogflow.diagnosis.finding import DiagnosisFinding, StepResult
from cogflow.diagnosis.tensor_comparison import Pair, compare
from cogflow.errors import CogflowError
from cogflow.weights.tensor_source import WeightsFolder

DOUBTFUL = 0.9  # a cosine below which it is looked into whether parts of a tensor have changed places
SHOWN = 12  # tensors of a component that are listed with their numbers
ANOTHER = 0.5
"""A cosine below which a tensor is no descendant of the reference's. Finetuning leaves 0.99 and more; permuted and fresh ones are near 0;
only small vectors (biases that start from nothing) come between."""
FEW = 0.34  # a share of a component's tensors (or blocks) up to which those that differ are what is odd about it
OUTLIER = 3.0  # times the median change of the blocks, from which a block is of another training
Advance = Callable[[str], None]


def compare_weights(
    candidate: DiagnosisInput, reference: DiagnosisInput, advance: Advance = lambda note: None
) -> StepResult:
    """All components with weights. One pass over both files; memory is that of one tensor."""
    findings: list[DiagnosisFinding] = []
    lines: list[str] = []
    facts: dict[str, Any] = {}
    for name, stem in STEMS.items():
        ours, theirs = candidate.parts.get(name), reference.parts.get(name)
        if ours is None or theirs is None or not ours.class_name or not theirs.class_name:
            continue
        try:
            folders = WeightsFolder(ours.folder, stem), WeightsFolder(theirs.folder, stem)
        except CogflowError as error:
            why = "Its weights cannot be read."
            findings.append(
                DiagnosisFinding(
                    "weights", name, "broken", candidate=error.message, rung=candidate.rung, confidence=1.0, why=why
                )
            )
            continue
        advance(name)
        if [file.resolve() for file in folders[0].files] == [
            file.resolve() for file in folders[1].files
        ] or _same_files(*folders):
            lines.append(f"{name}: the same files")
            facts[name] = {"equal": True}
            continue
        pairs = [compare(key, folders[0].read(key), folders[1].read(key)) for key in _shared(*folders)]
        found = [*_names(name, candidate, *folders), *judge(name, candidate, reference, pairs, *folders)]
        findings += found
        facts[name] = summary(pairs)
        lines.append(f"{name}: {told(pairs)}" + "".join(f"\n  {finding.line()}" for finding in found))
    return StepResult("weights", findings, lines or ["there are no weights to compare"], facts)


def _same_files(ours: WeightsFolder, theirs: WeightsFolder) -> bool:
    """Hard links of one another."""
    ids = [[(file.stat().st_dev, file.stat().st_ino) for file in folder.files] for folder in (ours, theirs)]
    return ids[0] == ids[1]


def _shared(ours: WeightsFolder, theirs: WeightsFolder) -> list[str]:
    return [
        key
        for key in sorted(ours.tensors)
        if key in theirs.tensors and ours.tensors[key].shape == theirs.tensors[key].shape
    ]


def _names(name: str, side: DiagnosisInput, ours: WeightsFolder, theirs: WeightsFolder) -> Iterator[DiagnosisFinding]:
    missing, extra = (
        sorted(theirs.tensors.keys() - ours.tensors.keys()),
        sorted(ours.tensors.keys() - theirs.tensors.keys()),
    )
    if missing:
        why = f"{len(missing)} tensors of the reference are not there: diffusers fills them with random numbers."
        yield DiagnosisFinding(
            "weights", name, "missing", missing[0], True, len(missing), 0, side.rung, 0.95, why, _swap(name)
        )
    if extra:
        why = f"{len(extra)} tensors that the reference has not: nothing reads them."
        yield DiagnosisFinding(
            "weights", name, "extra", extra[0], True, len(extra), 0, side.rung, 0.4, why, _swap(name)
        )
    for key in sorted(ours.tensors.keys() & theirs.tensors.keys()):
        mine, other = ours.tensors[key].shape, theirs.tensors[key].shape
        if mine != other:
            kind = "transposed" if mine == other[::-1] else "shape"
            yield DiagnosisFinding(
                "weights",
                name,
                kind,
                key,
                True,
                list(mine),
                list(other),
                side.rung,
                0.95,
                "It has another shape.",
                _swap(name),
            )


def judge(
    name: str, side: DiagnosisInput, reference: DiagnosisInput, pairs: list[Pair], ours: WeightsFolder, theirs: WeightsFolder
) -> Iterator[DiagnosisFinding]:  # fmt: skip
    """What is odd about the pairs of a component, each oddity once."""
    broken = [pair for pair in pairs if pair.non_finite]
    for pair in broken[:3]:
        count = f"{pair.non_finite} values are no numbers."
        yield DiagnosisFinding(
            "weights", name, "non_finite", pair.name, True, pair.non_finite, 0, side.rung, 1.0, count, _swap(name)
        )
    sound = [pair for pair in pairs if not pair.non_finite]
    different = [pair for pair in sound if not pair.equal]
    yield from _rounded(name, side, different)
    odd = [pair for pair in different if pair.constant is not None or pair.cosine < ANOTHER]
    matrices = [pair for pair in sound if len(pair.shape) > 1]
    if sum(pair in odd for pair in matrices) > 0.6 * len(matrices):
        yield _whole(name, side, odd, different)
        return
    doubtful = [pair for pair in different if pair.cosine < DOUBTFUL]
    explained = list(tensor_origin.explain(name, side.rung, odd, doubtful, ours, theirs))
    yield from explained
    rest = [pair for pair in different if pair not in odd and not _only_rounded(pair)]
    if rest and not explained:
        yield from _other_training(name, side, reference, sound, rest, theirs)


def _rounded(name: str, side: DiagnosisInput, different: list[Pair]) -> Iterator[DiagnosisFinding]:
    """Values stored in full precision that were rounded to half of it on the way."""
    rounded = [pair for pair in different if _only_rounded(pair) and pair.dtypes[0] == "float32"]
    if not rounded or len(rounded) < 0.5 * len(different):
        return
    through = rounded[0].only
    largest = max(pair.relative for pair in rounded)
    why = (
        f"{len(rounded)} tensors are stored in float32 and hold only values of {through}: they were rounded on the way."
    )
    yield DiagnosisFinding(
        "weights", name, "rounded", "", False, through, rounded[0].dtypes[1], side.rung, 0.55, why, _swap(name)
    ).sure(0.55 if largest < 1 else 0.8)


def _only_rounded(pair: Pair) -> bool:
    """Whether a rounding explains all of the difference: bf16 keeps 8 bits of each value."""
    return pair.only is not None and pair.change < 2**-8


def _whole(name: str, side: DiagnosisInput, odd: list[Pair], different: list[Pair]) -> DiagnosisFinding:
    """Most tensors have nothing to do with the reference's."""
    stds = [pair.std[0] / pair.std[1] for pair in odd if pair.std[1] > 0 and len(pair.shape) > 1]
    constant = sum(pair.constant is not None for pair in different)
    fresh = constant > 0.2 * len(different)
    kind = "reset" if fresh else "replaced"
    why = (
        f"{len(odd)} of {len(different)} tensors have nothing in common with the reference's, and {constant} hold one value only: "
        "the component stands at its initialisation."
        if fresh
        else f"{len(odd)} of {len(different)} tensors have nothing in common with the reference's: it is another model's."
    )
    return DiagnosisFinding(
        "weights",
        name,
        kind,
        "",
        False,
        f"std x{median(stds):.2g}" if stds else None,
        "x1",
        side.rung,
        0.97,
        why,
        _swap(name),
    )


def _other_training(
    name: str, side: DiagnosisInput, reference: DiagnosisInput, sound: list[Pair], rest: list[Pair], theirs: WeightsFolder
) -> Iterator[DiagnosisFinding]:  # fmt: skip
    """Tensors that moved a little: a few only, or much farther than the rest, are of another step; all of them are another training."""
    blocks: dict[str, list[Pair]] = {}
    for pair in sound:
        blocks.setdefault(tensor_origin.block(pair.name), []).append(pair)
    moved = {
        block: max((p.change for p in pairs if not p.equal and not _only_rounded(p)), default=0.0)
        for block, pairs in blocks.items()
    }
    touched = {block: change for block, change in moved.items() if change > 0}
    if 0 < len(touched) <= FEW * len(blocks):
        for block, change in touched.items():
            why = f"All else equals the reference; this part is off by {change:.2g} of its size: it is of another step or another run."
            yield DiagnosisFinding(
                "weights", name, "replaced", block, True, round(change, 6), 0.0, side.rung, 0.85, why, _swap(name)
            )
        return
    untouched = [block for block, change in moved.items() if change == 0]
    part = len(rest) / max(1, len(sound))
    if untouched and 0.1 < part < 0.9:
        why = f"{len(rest)} of {len(sound)} tensors differ a little, {len(sound) - len(rest)} not at all: two sources are mixed."
        yield DiagnosisFinding(
            "weights",
            name,
            "mixed",
            tensor_origin.block(rest[0].name),
            True,
            len(rest),
            0,
            side.rung,
            0.8,
            why,
            _swap(name),
        )
        return
    usual = median(touched.values())
    for block, change in touched.items():
        if change > OUTLIER * usual and change > 1e-3 and len(touched) >= 4:
            why = f"It moved {change / usual:.1f} times as far from the reference as the other parts: it is of another step or another run."
            yield DiagnosisFinding(
                "weights",
                name,
                "replaced",
                block,
                True,
                round(change, 6),
                round(usual, 6),
                side.rung,
                0.6,
                why,
                _swap(name),
            )
    yield from _another_run(name, side, reference, rest, usual)


def _another_run(
    name: str, side: DiagnosisInput, reference: DiagnosisInput, rest: list[Pair], usual: float
) -> Iterator[DiagnosisFinding]:
    """All tensors moved a little. Is that the finetuning that the candidate's record tells of, or not?"""
    ours, theirs = side.training, reference.training
    if name == "transformer":
        if theirs.source is None:
            return  # held against a base model: a finetune of it
        if ours.source is not None and ours.source != theirs.source:
            why = f"Another training than the reference's: {ours.source}, not {theirs.source}."
            yield DiagnosisFinding("weights", name, "training", "", False, round(usual, 6), 0.0, side.rung, 0.2, why)
            return
        told = (
            "its record names the reference's own training"
            if ours.source is not None
            else "it has no record of its training"
        )
        why = f"{len(rest)} tensors differ by {usual:.2g} of their size, and {told}: weights of another run or step."
        yield DiagnosisFinding(
            "weights", name, "replaced", "", False, round(usual, 6), 0.0, side.rung, 0.75, why, _swap(name)
        )
        return
    why = f"{len(rest)} tensors differ by {usual:.2g} of their size, and nothing trains this component."
    yield DiagnosisFinding(
        "weights", name, "replaced", "", False, round(usual, 6), 0.0, side.rung, 0.6, why, _swap(name)
    )


def summary(pairs: list[Pair]) -> dict[str, Any]:
    """For diagnosis.json: counts, and the tensors that changed most."""
    by_change = sorted(pairs, key=lambda pair: -pair.change)
    return {
        "equal": all(pair.equal for pair in pairs),
        "tensors": len(pairs),
        "different": sum(not pair.equal for pair in pairs),
        "largest": [pair.as_dict() for pair in by_change[:SHOWN] if not pair.equal],
    }


def told(pairs: list[Pair]) -> str:
    different = [pair for pair in pairs if not pair.equal]
    if not different:
        cast = any(pair.dtypes[0] != pair.dtypes[1] for pair in pairs)
        return f"{len(pairs)} tensors, all equal" + (" but for the dtype" if cast else "")
    worst = max(different, key=lambda pair: pair.change)
    return f"{len(different)} of {len(pairs)} tensors differ; most {worst.name}, by {worst.change:.2g} of its size"


def _swap(name: str) -> str:
    return f"stage.{name}=REFERENCE"
