"""SAT's LoRA: ``matrix_A.i`` ``[rank, in]`` and ``matrix_B.i`` ``[out / n, rank]`` beside each adapted linear layer.

The layer computes ``original(x)`` plus, for part ``i`` of its ``n`` equal parts of rows, ``B_i A_i x * alpha /
rank``. query_key_value has three parts, dense one. No checkpoint stores ``alpha``: it is 1 unless ``lora_alpha`` was
given on SAT's command line. Sources: ``sat.model.finetune.lora2`` and the checkpoints it writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from cogflow.errors import ConversionError, format_list
from cogflow.export.tensor_operations import ChunkMap, Operation, Rename
from cogflow.weights.tensor_source import RenamedTensors, TensorInfo, TensorSource

_MATRIX = re.compile(r"(?P<layer>.+)\.matrix_(?P<side>[AB])\.(?P<part>\d+)")
_ORIGINAL = re.compile(r"(?P<layer>.+)\.original\.(?P<kind>weight|bias)")


@dataclass(frozen=True)
class LoraFacts:
    """``layers``: adapted layer (without ``.weight``) to its number of parts. ``rank`` is the same in all layers."""

    rank: int
    layers: dict[str, int]


def find_lora(source: TensorSource) -> LoraFacts | None:
    """Return the adapted layers by names and shapes, ``None`` without LoRA.

    Raises :class:`ConversionError` listing every adapter that is incomplete or has wrong shapes.
    """
    adapters: dict[str, dict[tuple[str, int], TensorInfo]] = {}
    for name, info in source.tensors.items():
        if match := _MATRIX.fullmatch(name):
            adapters.setdefault(match["layer"], {})[match["side"], int(match["part"])] = info
    if not adapters:
        return None
    problems: list[str] = []
    ranks: dict[str, int] = {}
    for layer, matrices in adapters.items():
        problem = _adapter_problem(source.tensors.get(f"{layer}.original.weight"), matrices)
        if problem:
            problems.append(f"{layer}: {problem}")
        else:
            ranks[layer] = matrices["A", 0].shape[0]
    if len(set(ranks.values())) > 1:
        problems.append(f"ranks {sorted(set(ranks.values()))}: all layers must have one rank")
    if problems:
        raise ConversionError(
            f"The LoRA adapters are incomplete:\n{format_list(problems)}", "Save the checkpoint again."
        )
    return LoraFacts(next(iter(ranks.values())), {layer: len(matrices) // 2 for layer, matrices in adapters.items()})


def _adapter_problem(original: TensorInfo | None, matrices: Mapping[tuple[str, int], TensorInfo]) -> str:
    """Return what is wrong with one layer's adapter, empty if nothing is. ``original``: the weight of the layer."""
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


def merge_lora(
    source: TensorSource, alpha: float, rank: int | None = None, dtype: torch.dtype | None = None
) -> MergedLora:
    """Return a source whose weights include the LoRA: ``W + B A * alpha / rank``, summed in fp32, then cast.

    ``rank``: the yaml's rank, compared with the matrices'. ``dtype``: dtype of the merged weights; ``None`` keeps the
    stored dtype, which for bf16 rounds the sum. Raises :class:`ConversionError` without LoRA.
    """
    facts = _require_lora(source)
    if rank is not None and rank != facts.rank:
        raise ConversionError(
            f"The LoRA's rank is {facts.rank} by its matrices and {rank} by its yaml.", "Give the yaml of this run."
        )
    return MergedLora(source, facts, alpha, dtype)


class MergedLora:
    """Weights with a merged LoRA, under the names of a checkpoint without LoRA. See :func:`merge_lora`."""

    def __init__(self, source: TensorSource, facts: LoraFacts, alpha: float, dtype: torch.dtype | None) -> None:
        self.source = source
        self.facts = facts
        self.alpha = alpha
        self._names = _names_without_lora(source)
        adapted = {f"{layer}.weight" for layer in facts.layers}
        infos = {plain: source.tensors[name] for plain, name in self._names.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            plain: replace(info, name=plain, dtype=dtype if dtype is not None and plain in adapted else info.dtype)
            for plain, info in infos.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor; adapted weights are a new tensor, all others are passed through."""
        weight = self.source.read(self._names[name])
        layer = name.removesuffix(".weight")
        if name == layer or layer not in self.facts.layers:
            return weight
        total = weight.to(torch.float32, copy=True)
        for part, rows in enumerate(total.chunk(self.facts.layers[layer])):
            a, b = (self.source.read(f"{layer}.matrix_{side}.{part}").float() for side in "AB")
            rows.add_(b @ a, alpha=self.alpha / self.facts.rank)
        return total.to(self.tensors[name].dtype)


def without_lora(source: TensorSource) -> RenamedTensors:
    """Return the weights that the LoRA was trained on, under the names of a checkpoint without LoRA."""
    return RenamedTensors(source, _names_without_lora(source))


@dataclass(frozen=True)
class LoraFile:
    """Content of a LoRA file for ``pipeline.load_lora_weights``: tensors and the header's metadata."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def to_diffusers_lora(source: TensorSource, table: Iterable[Operation], alpha: float) -> LoraFile:
    """Return the LoRA under diffusers' names: ``transformer.<layer>.lora_A.weight`` ``[rank, in]`` and ``lora_B``
    ``[out, rank]``.

    Tensors are contiguous and keep their dtype. A loader without further settings scales by 1, so ``alpha / rank`` is
    multiplied into ``lora_B`` (in fp32; exact for powers of two); the metadata records alpha, rank and that. Raises
    :class:`ConversionError` for layers that ``table`` does not map to one layer per part.
    """
    facts = _require_lora(source)
    targets = _adaptable_targets(table)
    made: dict[str, torch.Tensor] = {}
    unmapped = []
    for layer, parts in facts.layers.items():
        names = targets.get(f"{layer}.weight", ())
        if len(names) != parts:
            unmapped.append(f"{layer}: {parts} adapter{'s' * (parts > 1)} for {len(names)} layers of diffusers")
            continue
        for part, name in enumerate(names):
            stem = f"transformer.{name.removesuffix('.weight')}"
            a, b = (source.read(f"{layer}.matrix_{side}.{part}") for side in "AB")
            made[f"{stem}.lora_A.weight"] = a.clone().contiguous()
            made[f"{stem}.lora_B.weight"] = (b.float() * (alpha / facts.rank)).to(b.dtype).contiguous()
    if unmapped:
        raise ConversionError(
            f"These adapters have no counterpart in diffusers:\n{format_list(unmapped)}",
            "Merge the LoRA into the weights instead (stage.lora=merge).",
        )
    metadata = {
        "format": "pt",
        "lora_rank": str(facts.rank),
        "lora_alpha": repr(float(alpha)),
        "lora_scale": "multiplied into lora_B",
    }
    return LoraFile(made, metadata)


def _adaptable_targets(table: Iterable[Operation]) -> dict[str, tuple[str, ...]]:
    """Return source to targets of weights that are renamed, or split into one run of rows per target."""
    found: dict[str, tuple[str, ...]] = {}
    for operation in table:
        is_split = isinstance(operation, ChunkMap) and all(len(chunks) == 1 for chunks in operation.target_chunks)
        if isinstance(operation, Rename) or is_split:
            found[operation.sources[0]] = operation.targets
    return found


def _names_without_lora(source: TensorSource) -> dict[str, str]:
    """Return the name without LoRA to the name in the file, of all tensors but the adapters."""
    names = {}
    for name in source.tensors:
        match = _ORIGINAL.fullmatch(name)
        if not _MATRIX.fullmatch(name):
            names[f"{match['layer']}.{match['kind']}" if match else name] = name
    return names


def _require_lora(source: TensorSource) -> LoraFacts:
    facts = find_lora(source)
    if facts is None:
        raise ConversionError(
            "These weights hold no LoRA (no matrix_A, matrix_B).", "Export them without LoRA options."
        )
    return facts
