"""Step 2, weights: compare every tensor of the candidate with the reference's, and explain those that differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from cogflow.assemble.components import STEMS
from cogflow.diagnosis.diagnosis_input import DiagnosisInput
from cogflow.diagnosis.finding import DiagnosisFinding, WeightsResult
from cogflow.diagnosis.tensor_comparison import TensorPair, block_of, compare_tensors, original_of, row_order_of
from cogflow.errors import CogflowError
from cogflow.files.record_io import JsonObject, JsonValue
from cogflow.tracking.stage_record import to_json
from cogflow.weights.tensor_source import WeightsFolder

SUSPICIOUS_COSINE = 0.9
"""Cosine below which parts of a tensor may have been exchanged."""

UNRELATED_COSINE = 0.5
"""Cosine below which a tensor was not trained from the reference's.

Finetuning leaves 0.99 and more; permuted and freshly initialised tensors are near 0. Only small vectors (biases that
start at zero) are in between.
"""

FEW = 0.34
"""Share of a component's blocks up to which the blocks that differ are the fault."""

OUTLIER = 3.0
"""Multiple of the median change of the blocks from which a block comes from another training."""

MAX_LISTED = 12
"""Tensors of a component that are listed with their numbers in diagnosis.json."""

MAX_BLOCKS = 24
"""Blocks with suspicious tensors that are explained; more than that concern the whole component."""


@dataclass(frozen=True)
class ComponentPair:
    """The weights of a component in candidate and reference."""

    name: str
    candidate: DiagnosisInput
    reference: DiagnosisInput
    ours: WeightsFolder
    theirs: WeightsFolder

    @property
    def exchange(self) -> str:
        """Option of stage=assemble that takes the component from the reference."""
        return f"stage.{self.name}=REFERENCE"

    def finding(
        self,
        kind: str,
        values: tuple[JsonValue, JsonValue],
        confidence: float,
        why: str,
        *,
        tensor: str = "",
        fix: str | None = None,
    ) -> DiagnosisFinding:
        """Return a finding of this component. ``values``: of the candidate and the reference; ``tensor``: or block."""
        return DiagnosisFinding(
            step="weights",
            component=self.name,
            kind=kind,
            name=tensor,
            is_tensor=bool(tensor),
            candidate=values[0],
            reference=values[1],
            rung=self.candidate.rung,
            confidence=confidence,
            why=why,
            fix=self.exchange if fix is None else fix,
        )


def compare_weights(
    candidate: DiagnosisInput, reference: DiagnosisInput, advance: Callable[[str], None] = lambda name: None
) -> WeightsResult:
    """Compare all components with weights in one pass over both files. Memory: one tensor of each file.

    ``advance`` is called with the name of each component before it is read.
    """
    findings: list[DiagnosisFinding] = []
    lines: list[str] = []
    measurements: dict[str, JsonObject] = {}
    for name in STEMS:
        try:
            pair = _component_pair(name, candidate, reference)
        except CogflowError as error:
            findings.append(_unreadable(name, candidate.rung, error))
            continue
        if pair is None:
            continue
        advance(name)
        if _same_files(pair):
            lines.append(f"{name}: the same files")
            measurements[name] = {"equal": True}
            continue
        tensors = [compare_tensors(key, pair.ours.read(key), pair.theirs.read(key)) for key in _comparable_names(pair)]
        found = [*_different_names(pair), *explain_differences(pair, tensors)]
        findings += found
        measurements[name] = _measurements(tensors)
        lines.append(f"{name}: {_summary(tensors)}" + "".join(f"\n  {finding.line()}" for finding in found))
    return WeightsResult(
        name="weights",
        findings=findings,
        lines=lines or ["there are no weights to compare"],
        measurements=measurements,
        compared=list(measurements),
        changed=[name for name, one in measurements.items() if not one["equal"]],
    )


def _component_pair(name: str, candidate: DiagnosisInput, reference: DiagnosisInput) -> ComponentPair | None:
    """Return the weights of both inputs, or ``None`` when one has none. Raises :class:`CogflowError` for unreadable
    weights.
    """
    ours, theirs = candidate.parts.get(name), reference.parts.get(name)
    if ours is None or theirs is None or not ours.class_name or not theirs.class_name:
        return None
    own, other = WeightsFolder(ours.folder, STEMS[name]), WeightsFolder(theirs.folder, STEMS[name])
    return ComponentPair(name, candidate, reference, own, other)


def _unreadable(name: str, rung: int, error: CogflowError) -> DiagnosisFinding:
    return DiagnosisFinding(
        step="weights",
        component=name,
        kind="broken",
        candidate=error.message,
        rung=rung,
        confidence=1.0,
        why="Its weights cannot be read.",
    )


def _same_files(pair: ComponentPair) -> bool:
    """Return whether both inputs read the same files, by path or by hard link."""
    own, other = ([file.resolve() for file in weights.files] for weights in (pair.ours, pair.theirs))
    if own == other:
        return True
    own_ids, other_ids = ([(file.stat().st_dev, file.stat().st_ino) for file in files] for files in (own, other))
    return own_ids == other_ids


def _comparable_names(pair: ComponentPair) -> list[str]:
    """Return the names of the tensors that have the same shape in both."""
    ours, theirs = pair.ours.tensors, pair.theirs.tensors
    return [key for key in sorted(ours) if key in theirs and ours[key].shape == theirs[key].shape]


def _different_names(pair: ComponentPair) -> Iterator[DiagnosisFinding]:
    """Yield missing tensors, extra tensors and tensors of another shape."""
    ours, theirs = pair.ours.tensors, pair.theirs.tensors
    missing, extra = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    if missing:
        why = f"{len(missing)} tensors of the reference are missing: diffusers fills them with random numbers."
        yield pair.finding("missing", (len(missing), 0), 0.95, why, tensor=missing[0])
    if extra:
        why = f"{len(extra)} tensors are not in the reference: nothing reads them."
        yield pair.finding("extra", (len(extra), 0), 0.4, why, tensor=extra[0])
    for key in sorted(ours.keys() & theirs.keys()):
        own, other = ours[key].shape, theirs[key].shape
        if own != other:
            kind = "transposed" if own == other[::-1] else "shape"
            yield pair.finding(kind, (list(own), list(other)), 0.95, "It has another shape.", tensor=key)


def explain_differences(pair: ComponentPair, tensors: list[TensorPair]) -> Iterator[DiagnosisFinding]:
    """Yield one finding for each kind of difference between the tensors of a component."""
    for tensor in [tensor for tensor in tensors if tensor.non_finite][:3]:
        why = f"{tensor.non_finite} values are not finite."
        yield pair.finding("non_finite", (tensor.non_finite, 0), 1.0, why, tensor=tensor.name)
    finite = [tensor for tensor in tensors if not tensor.non_finite]
    different = [tensor for tensor in finite if not tensor.equal]
    yield from _rounded(pair, different)
    unrelated = [tensor for tensor in different if tensor.constant is not None or tensor.cosine < UNRELATED_COSINE]
    matrices = [tensor for tensor in finite if len(tensor.shape) > 1]
    if sum(tensor in unrelated for tensor in matrices) > 0.6 * len(matrices):
        yield _other_component(pair, unrelated, different)
        return
    suspicious = [tensor for tensor in different if tensor.cosine < SUSPICIOUS_COSINE]
    explained = list(_explain_blocks(pair, unrelated, suspicious))
    yield from explained
    changed = [tensor for tensor in different if tensor not in unrelated and not tensor.only_rounded]
    if changed and not explained:
        yield from _small_changes(pair, finite, changed)


def _rounded(pair: ComponentPair, different: list[TensorPair]) -> Iterator[DiagnosisFinding]:
    """Yield a finding when most different tensors are stored in fp32 but were rounded to 16 bits before."""
    rounded = [tensor for tensor in different if tensor.only_rounded and tensor.dtypes[0] == "float32"]
    if not rounded or len(rounded) < 0.5 * len(different):
        return
    only = rounded[0].only
    why = f"{len(rounded)} tensors are stored in float32 and hold only values of {only}: they were rounded before."
    confidence = 0.55 if max(tensor.relative for tensor in rounded) < 1 else 0.8
    yield pair.finding("rounded", (only, rounded[0].dtypes[1]), confidence, why)


def _other_component(pair: ComponentPair, unrelated: list[TensorPair], different: list[TensorPair]) -> DiagnosisFinding:
    """Return the finding of a component whose tensors are mostly unrelated to the reference's."""
    ratios = [one.std[0] / one.std[1] for one in unrelated if one.std[1] > 0 and len(one.shape) > 1]
    constant = sum(tensor.constant is not None for tensor in different)
    counts = f"{len(unrelated)} of {len(different)} tensors are unrelated to the reference's"
    kind, why = "replaced", f"{counts}: it belongs to another model."
    if constant > 0.2 * len(different):
        kind, why = "reset", f"{counts}, and {constant} are constant: the component has its initial values."
    return pair.finding(kind, (f"std x{median(ratios):.2g}" if ratios else None, "x1"), 0.97, why)


def _explain_blocks(
    pair: ComponentPair, unrelated: list[TensorPair], suspicious: list[TensorPair]
) -> Iterator[DiagnosisFinding]:
    """Yield a finding for each block whose tensors were exchanged, permuted, reset or replaced."""
    blocks: dict[str, list[TensorPair]] = {}
    for tensor in suspicious[: MAX_BLOCKS * 4]:
        blocks.setdefault(block_of(tensor.name), []).append(tensor)
    for block, tensors in list(blocks.items())[:MAX_BLOCKS]:
        varied = [one for one in tensors if one.constant is None and torch.Size(one.shape).numel() > 1]
        originals = {one.name: found for one in varied if (found := original_of(one, pair.ours, pair.theirs))}
        orders = {
            one.name: order
            for one in varied
            if one.name not in originals and (order := row_order_of(one, pair.ours, pair.theirs)) is not None
        }
        if originals:
            yield _swapped(pair, originals)
        if orders:
            yield _permuted(pair, orders)
        if not originals and not orders:
            yield from _reset_or_replaced(pair, block, [one for one in tensors if one in unrelated])


def _swapped(pair: ComponentPair, originals: Mapping[str, str]) -> DiagnosisFinding:
    name, original = next(iter(originals.items()))
    others = f", and {len(originals) - 1} more such tensors" if len(originals) > 1 else ""
    why = f"It is the reference's {original}{others}: tensors were exchanged."
    return pair.finding("swapped", (original, name), 0.95, why, tensor=_common_name(sorted(originals)))


def _common_name(names: list[str]) -> str:
    """Return one name for exchanged tensors: the block for many, the module for weight and bias, else the tensor."""
    if len(names) > 4:
        return block_of(names[0])
    return names[0].rsplit(".", 1)[0] if len(names) > 1 else names[0]


def _permuted(pair: ComponentPair, orders: Mapping[str, list[int]]) -> DiagnosisFinding:
    name, order = next(iter(orders.items()))
    shown = " ".join(map(str, order))
    why = (
        f"Its rows are the reference's in another order ({len(order)} parts: {shown}): shift and scale were exchanged."
    )
    return pair.finding("permuted", (order, list(range(len(order)))), 0.95, why, tensor=name)


def _reset_or_replaced(pair: ComponentPair, block: str, unrelated: list[TensorPair]) -> Iterator[DiagnosisFinding]:
    if not unrelated:
        return
    constant = [tensor for tensor in unrelated if tensor.constant is not None]
    reset = bool(constant) or all(abs(tensor.cosine) < 0.2 for tensor in unrelated)
    first = constant[0] if constant else unrelated[0]
    value = f"std {first.std[0]:.3g}" if first.constant is None else f"{first.constant:g} everywhere"
    why = f"{len(unrelated)} of its tensors are unrelated to the reference's"
    why += ": they have their initial values." if reset else "."
    yield pair.finding(
        "reset" if reset else "replaced",
        (value, f"std {first.std[1]:.3g}"),
        0.95,
        why,
        tensor=block if len(unrelated) > 1 else unrelated[0].name,
    )


def _small_changes(
    pair: ComponentPair, tensors: list[TensorPair], changed: list[TensorPair]
) -> Iterator[DiagnosisFinding]:
    """Yield findings for tensors that differ slightly.

    A few blocks, or blocks that changed much more than the others, are of another step. Some tensors changed and some
    not: two sources are mixed. All tensors changed: another training.
    """
    changes = _change_by_block(tensors)
    touched = {block: change for block, change in changes.items() if change > 0}
    if 0 < len(touched) <= FEW * len(changes):
        for block, change in touched.items():
            why = f"All else equals the reference; this block differs by {change:.2g} of its size: "
            why += "it is of another step or run."
            yield pair.finding("replaced", (round(change, 6), 0.0), 0.85, why, tensor=block)
        return
    share = len(changed) / max(1, len(tensors))
    if len(touched) < len(changes) and 0.1 < share < 0.9:
        equal = len(tensors) - len(changed)
        why = f"{len(changed)} of {len(tensors)} tensors differ slightly, {equal} not at all: two sources are mixed."
        yield pair.finding("mixed", (len(changed), 0), 0.8, why, tensor=block_of(changed[0].name))
        return
    usual = median(touched.values())
    for block, change in touched.items():
        if change > OUTLIER * usual and change > 1e-3 and len(touched) >= 4:
            why = f"It differs {change / usual:.1f} times as much as the other blocks: it is of another step or run."
            values = (round(change, 6), round(usual, 6))
            yield pair.finding("replaced", values, 0.6, why, tensor=block)
    yield from _other_training(pair, len(changed), usual)


def _change_by_block(tensors: list[TensorPair]) -> dict[str, float]:
    """Return the largest change of each block; 0 for blocks that are equal or only rounded."""
    changes: dict[str, float] = {}
    for tensor in tensors:
        change = 0.0 if tensor.equal or tensor.only_rounded else tensor.change
        block = block_of(tensor.name)
        changes[block] = max(changes.get(block, 0.0), change)
    return changes


def _other_training(pair: ComponentPair, changed: int, usual: float) -> Iterator[DiagnosisFinding]:
    """Yield a finding when all tensors differ slightly and the records do not explain it by a finetuning."""
    values = (round(usual, 6), 0.0)
    differ = f"{changed} tensors differ by {usual:.2g} of their size"
    if pair.name != "transformer":
        yield pair.finding("replaced", values, 0.6, f"{differ}, and nothing trains this component.")
        return
    own, other = pair.candidate.training.source, pair.reference.training.source
    if other is None:
        return  # the reference is a base model, and the candidate a finetune of it
    if own is None:
        why = f"{differ}, and it has no record of its training: weights of another run or step."
        yield pair.finding("replaced", values, 0.75, why)
    elif own == other:
        why = f"{differ}, and its record names the reference's own training: weights of another run or step."
        yield pair.finding("replaced", values, 0.75, why)
    else:
        why = f"Another training than the reference's: {own}, not {other}."
        yield pair.finding("training", values, 0.2, why, fix="")


def _measurements(tensors: list[TensorPair]) -> dict[str, Any]:
    """Return counts and the tensors that changed most, for diagnosis.json."""
    by_change = sorted(tensors, key=lambda tensor: -tensor.change)
    return {
        "equal": all(tensor.equal for tensor in tensors),
        "tensors": len(tensors),
        "different": sum(not tensor.equal for tensor in tensors),
        "largest": [to_json(tensor) for tensor in by_change[:MAX_LISTED] if not tensor.equal],
    }


def _summary(tensors: list[TensorPair]) -> str:
    different = [tensor for tensor in tensors if not tensor.equal]
    if not different:
        cast = any(tensor.dtypes[0] != tensor.dtypes[1] for tensor in tensors)
        return f"{len(tensors)} tensors, all equal" + (" but for the dtype" if cast else "")
    worst = max(different, key=lambda tensor: tensor.change)
    most = f"most {worst.name}, by {worst.change:.2g} of its size"
    return f"{len(different)} of {len(tensors)} tensors differ; {most}"
