"""SAT's LoRA: beside each adapted linear layer lie ``matrix_A.i [rank, in]`` and ``matrix_B.i [out / n, rank]``.

Sources: ``sat.model.finetune.lora2`` and the checkpoints it writes. The layer computes ``original(x)`` plus, for part ``i`` of
its ``n`` equal parts of rows, ``B_i A_i x * alpha / rank``; query_key_value has three parts, dense one. ``alpha`` is in no file: it
is 1 unless ``lora_alpha`` was given on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from cogflow.errors import ConversionError, format_list
from cogflow.export.algebra import ChunkMap, Operation, Rename
from cogflow.weights.tensor_source import RenamedTensors, TensorInfo, TensorSource

_MATRIX = re.compile(r"(?P<layer>.+)\.matrix_(?P<side>[AB])\.(?P<part>\d+)")
_ORIGINAL = re.compile(r"(?P<layer>.+)\.original\.(?P<kind>weight|bias)")


@dataclass(frozen=True)
class LoraFacts:
    """``layers``: adapted layer (without ``.weight``) to its number of parts; ``rank`` is the same everywhere."""

    rank: int
    layers: dict[str, int]

    def describe(self) -> dict[str, Any]:
        return {"rank": self.rank, "adapted layers": len(self.layers)}


def find_lora(source: TensorSource) -> LoraFacts | None:
    """What is adapted, from names and shapes; ``None`` without LoRA.

    Raises :class:`ConversionError` that lists every incomplete or misshapen adapter.
    """
    sides: dict[str, dict[tuple[str, int], TensorInfo]] = {}
    for name, info in source.tensors.items():
        if match := _MATRIX.fullmatch(name):
            sides.setdefault(match["layer"], {})[match["side"], int(match["part"])] = info
    if not sides:
        return None
    problems: list[str] = []
    ranks: dict[str, int] = {}
    for layer, matrices in sides.items():
        problem = _problem(layer, matrices, source.tensors)
        if problem:
            problems.append(f"{layer}: {problem}")
        else:
            ranks[layer] = matrices["A", 0].shape[0]
    if len(set(ranks.values())) > 1:
        problems.append(f"ranks {sorted(set(ranks.values()))}: one is expected")
    if problems:
        raise ConversionError(
            f"The LoRA adapters are not whole:\n{format_list(problems)}", "Save the checkpoint again."
        )
    return LoraFacts(next(iter(ranks.values())), {layer: len(matrices) // 2 for layer, matrices in sides.items()})


def _problem(layer: str, matrices: Mapping[tuple[str, int], TensorInfo], tensors: Mapping[str, TensorInfo]) -> str:
    original = tensors.get(f"{layer}.original.weight")
    if original is None:
        return "adapters without the weight they belong to (.original.weight)"
    parts = len(matrices) // 2
    if set(matrices) != {(side, part) for side in "AB" for part in range(parts)}:
        return f"not a pair of matrices for each part: {sorted(f'{side}.{part}' for side, part in matrices)}"
    rows, columns = original.shape
    rank = matrices["A", 0].shape[0]
    for part in range(parts):
        a, b = tuple(matrices["A", part].shape), tuple(matrices["B", part].shape)
        if a != (rank, columns) or b != (rows // parts, rank) or rows % parts:
            return f"part {part} has A {list(a)} and B {list(b)} for a weight of {[rows, columns]}"
    return ""


def merged(source: TensorSource, alpha: float, rank: int | None = None, dtype: torch.dtype | None = None) -> Merged:
    """A source as if its LoRA had been trained into the weights: ``W + B A * alpha / rank``, summed in fp32, then cast.

    ``rank``: what a yaml says; it must be what the shapes say. ``dtype``: of the merged weights; ``None`` keeps what the file has,
    which for bf16 rounds the sum. Raises :class:`ConversionError` where there is no LoRA.
    """
    facts = _needed(source)
    if rank is not None and rank != facts.rank:
        raise ConversionError(
            f"The LoRA's rank is {facts.rank} by its matrices and {rank} by its yaml.", "Give the yaml of this run."
        )
    return Merged(source, facts, alpha, dtype)


class Merged:
    """See :func:`merged`. Names are those of a checkpoint without LoRA; what is not adapted is passed through."""

    def __init__(self, source: TensorSource, facts: LoraFacts, alpha: float, dtype: torch.dtype | None) -> None:
        self.source, self.facts, self.alpha = source, facts, alpha
        self._names = _plain_names(source)
        weights = {f"{layer}.weight" for layer in facts.layers}
        self.tensors: Mapping[str, TensorInfo] = {
            plain: replace(info, name=plain, dtype=dtype if dtype is not None and plain in weights else info.dtype)
            for plain, info in ((plain, source.tensors[name]) for plain, name in self._names.items())
        }

    def read(self, name: str) -> torch.Tensor:
        weight, layer = self.source.read(self._names[name]), name.removesuffix(".weight")
        if name == layer or layer not in self.facts.layers:
            return weight
        total = weight.to(torch.float32, copy=True)
        for part, rows in enumerate(total.chunk(self.facts.layers[layer])):
            a, b = (self.source.read(f"{layer}.matrix_{side}.{part}").float() for side in "AB")
            rows.add_(b @ a, alpha=self.alpha / self.facts.rank)
        return total.to(self.tensors[name].dtype)


def base(source: TensorSource) -> RenamedTensors:
    """The weights that LoRA was trained on top of, without it, under the names of a checkpoint without LoRA."""
    return RenamedTensors(source, _plain_names(source))


def to_diffusers_lora(
    source: TensorSource, table: Iterable[Operation], alpha: float
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, header) of a LoRA file for ``pipeline.load_lora_weights``.

    Names are ``transformer.<layer>.lora_A.weight [rank, in]`` and ``lora_B.weight [out, rank]``, contiguous, in their dtype. A
    loader without further word scales by 1, so ``alpha / rank`` is multiplied into ``lora_B`` (in fp32, exact for powers of two);
    the header records alpha, rank and that. Raises :class:`ConversionError` for layers that the table does not keep whole or split.
    """
    facts = _needed(source)
    targets = _targets(table)
    made: dict[str, torch.Tensor] = {}
    lost = []
    for layer, parts in facts.layers.items():
        names = targets.get(f"{layer}.weight", ())
        if len(names) != parts:
            lost.append(f"{layer}: {parts} adapter{'s' * (parts > 1)} for {len(names)} layers of diffusers")
            continue
        for part, name in enumerate(names):
            stem = f"transformer.{name.removesuffix('.weight')}"
            a, b = (source.read(f"{layer}.matrix_{side}.{part}") for side in "AB")
            made[f"{stem}.lora_A.weight"] = a.clone().contiguous()
            made[f"{stem}.lora_B.weight"] = (b.float() * (alpha / facts.rank)).to(b.dtype).contiguous()
    if lost:
        raise ConversionError(
            f"These adapters have no counterpart:\n{format_list(lost)}", "Merge the LoRA into the weights instead."
        )
    header = {
        "format": "pt",
        "lora_rank": str(facts.rank),
        "lora_alpha": repr(float(alpha)),
        "lora_scale": "multiplied into lora_B",
    }
    return made, header


def _targets(table: Iterable[Operation]) -> dict[str, tuple[str, ...]]:
    """Adaptable weights: those kept under another name, and those cut into one run of rows per target."""
    found: dict[str, tuple[str, ...]] = {}
    for operation in table:
        if isinstance(operation, Rename) or (
            isinstance(operation, ChunkMap) and all(len(pieces) == 1 for pieces in operation.dealt)
        ):
            found[operation.sources[0]] = operation.targets
    return found


def _plain_names(source: TensorSource) -> dict[str, str]:
    """Name without LoRA to name in the file, for all but the adapters."""
    names = {}
    for name in source.tensors:
        match = _ORIGINAL.fullmatch(name)
        if not _MATRIX.fullmatch(name):
            names[f"{match['layer']}.{match['kind']}" if match else name] = name
    return names


def _needed(source: TensorSource) -> LoraFacts:
    facts = find_lora(source)
    if facts is None:
        raise ConversionError("These weights hold no LoRA (no matrix_A, matrix_B).", "Export them as they are.")
    return facts
