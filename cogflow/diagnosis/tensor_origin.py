"""What a tensor that is not the reference's really is: another one of its block, a permutation of its own rows, another block's, reset."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

import torch

from cogflow.diagnosis.finding import DiagnosisFinding
from cogflow.diagnosis.tensor_comparison import Pair, alike
from cogflow.weights.tensor_source import WeightsFolder

SURE = 0.9  # cosine from which a tensor is taken for another one
CHUNKS = (2, 3, 6, 9)  # of adaLN's rows: shift, scale and gate, of the video's and the text's tokens
MOST = 24  # tensors that are looked into; more than that is a matter of the whole
BLOCK = re.compile(
    r"^(.*?(?:blocks|block|resnets|layer|up_blocks|down_blocks)\.\d+(?:\.(?:resnets|layer|block)\.\d+)*)\."
)


def block(name: str) -> str:
    """The part of the model that a tensor belongs to: ``transformer_blocks.3``, ``decoder.up_blocks.1.resnets.0``, ``norm_final``."""
    found = BLOCK.match(name)
    return found[1] if found else name.split(".")[0]


def explain(
    component: str, rung: int, odd: list[Pair], doubtful: list[Pair], ours: WeightsFolder, theirs: WeightsFolder
) -> Iterator[DiagnosisFinding]:  # fmt: skip
    """A finding per block. ``odd``: tensors with little in common with the reference's of the same name; ``doubtful``: those and others
    of which parts may have changed places."""
    fix = f"stage.{component}=REFERENCE"
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in doubtful[: MOST * 4]:
        groups[block(pair.name)].append(pair)
    for where, pairs in list(groups.items())[:MOST]:
        large = [pair for pair in pairs if pair.constant is None and torch.Size(pair.shape).numel() > 1]
        partners = {pair.name: partner for pair in large if (partner := _partner(pair, ours, theirs)) is not None}
        rows = {
            pair.name: order
            for pair in large
            if pair.name not in partners and (order := _chunks(pair, ours, theirs)) is not None
        }
        if partners:
            name, partner = next(iter(partners.items()))
            many = "" if len(partners) == 1 else f", and {len(partners) - 1} more such tensors"
            why = f"It holds the reference's {partner}{many}: tensors have changed places."
            label = _short_of(partners)
            yield DiagnosisFinding("weights", component, "swapped", label, True, partner, name, rung, 0.95, why, fix)
        if rows:
            name, (parts, swapped) = next(iter(rows.items()))
            shown = " ".join(map(str, swapped))
            why = f"Its rows are the reference's in another order ({parts} parts: {shown}): shift and scale have changed places."
            yield DiagnosisFinding(
                "weights", component, "permuted", name, True, list(swapped), list(range(parts)), rung, 0.95, why, fix
            )
        rest = [pair for pair in pairs if pair in odd and pair.name not in partners and pair.name not in rows]
        if rest and not (partners or rows):
            constant = [pair for pair in rest if pair.constant is not None]
            label = where if len(rest) > 1 else rest[0].name
            kind = "reset" if constant or all(abs(pair.cosine) < 0.2 for pair in rest) else "replaced"
            first = constant[0] if constant else rest[0]
            value = f"{first.constant:g} everywhere" if first.constant is not None else f"std {first.std[0]:.3g}"
            why = f"{len(rest)} of its tensors have nothing in common with the reference's" + (
                ": they stand at their initialisation." if kind == "reset" else "."
            )
            yield DiagnosisFinding(
                "weights", component, kind, label, True, value, f"std {first.std[1]:.3g}", rung, 0.95, why, fix
            )


def _short_of(partners: dict[str, str]) -> str:
    """One name for tensors that changed places: the block, where most of it did; the module for weight and bias; the tensor."""
    first = sorted(partners)[0]
    if len(partners) > 4:
        return block(first)
    return first.rsplit(".", 1)[0] if len(partners) > 1 else first


def _partner(pair: Pair, ours: WeightsFolder, theirs: WeightsFolder) -> str | None:
    """The reference's tensor, of the same block or of the same name in another, that this one really is."""
    mine = ours.read(pair.name)
    where, end = block(pair.name), pair.name[len(block(pair.name)) :]
    others = [
        name
        for name, info in theirs.tensors.items()
        if name != pair.name and info.shape == pair.shape and (block(name) == where or name.endswith(end) and end)
    ]
    best = max(others, key=lambda name: alike(mine, theirs.read(name)), default=None)
    return best if best is not None and alike(mine, theirs.read(best)) > SURE else None


def _chunks(pair: Pair, ours: WeightsFolder, theirs: WeightsFolder) -> tuple[int, tuple[int, ...]] | None:
    """(number of parts, order) when the rows are the reference's in another order of equal parts, or the square is transposed."""
    mine, other = ours.read(pair.name), theirs.read(pair.name)
    for parts in CHUNKS:
        if mine.shape[0] % parts or mine.shape[0] == parts:
            continue
        pieces, originals = mine.chunk(parts), other.chunk(parts)
        order = []
        for place, piece in enumerate(pieces):
            close = [alike(piece, original) for original in originals]
            best = max(range(parts), key=lambda one: (close[one], one == place))
            if close[best] <= SURE:
                break
            order.append(best)
        if len(order) == parts and sorted(order) == list(range(parts)) and order != sorted(order):
            return parts, tuple(order)
    if mine.dim() == 2 and mine.shape[0] == mine.shape[1] and alike(mine.T.contiguous(), other) > SURE:
        return 2, (1, 0)
    return None
