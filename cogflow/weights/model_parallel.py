"""Join the parts of a model-parallel SAT checkpoint (``mp_rank_00_model_states.pt``, ``mp_rank_01_...``) into one
source.

SAT's split is taken from its ``sat/mpu/layers.py`` and ``sat/model/transformer.py`` (0.4.12). In each layer the fused
query_key_value is split by rows within each third, dense_h_to_4h by rows, dense and dense_4h_to_h by columns. Their
biases are split like the rows, or are stored whole. All other tensors are equal in every part; a tensor that differs
stops the export.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cogflow.errors import CheckpointError, ConversionError, format_list
from cogflow.weights.tensor_source import TensorInfo, TensorSource
from cogflow.weights.torch_file import TorchFile

PART_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")

_LAYER = re.compile(
    r"(?P<block>(?:.*\.)?transformer\.layers\.\d+\.(?:attention|mlp)\.)"
    r"(?P<linear>\w+)\.(?:original\.)?(?P<kind>\w+)(?:\.\d+)?"
)
_MERGE_WITH_SAT = "Merge the parts with SAT itself (MP1) and export the result."


@dataclass(frozen=True)
class _Split:
    """A split along ``dim``, within each of ``stride`` equal blocks."""

    dim: int
    stride: int = 1


_SPLITS = {
    ("query_key_value", "weight"): _Split(0, 3),
    ("query_key_value", "bias"): _Split(0, 3),
    ("dense_h_to_4h", "weight"): _Split(0),
    ("dense_h_to_4h", "bias"): _Split(0),
    ("dense", "weight"): _Split(1),
    ("dense_4h_to_h", "weight"): _Split(1),
}
_NOT_SPLIT = {("dense", "bias"), ("dense_4h_to_h", "bias")}


def part_files(folder: Path) -> list[Path]:
    """Return the parts in an iteration's folder, ordered by number; empty if there is none.

    Raises :class:`CheckpointError` if a number is missing.
    """
    parts = {int(match[1]): path for path in folder.iterdir() if (match := PART_FILE.fullmatch(path.name))}
    missing = sorted(set(range(max(parts, default=-1) + 1)) - parts.keys())
    if missing:
        names = ", ".join(f"mp_rank_{number:02d}_model_states.pt" for number in missing[:8])
        raise CheckpointError(
            f"{folder} lacks {names}; it holds parts up to {max(parts)}.", "Copy every part of the checkpoint."
        )
    return [parts[number] for number in sorted(parts)]


def check_part_count(file: TorchFile, parts: int) -> None:
    """Raise :class:`CheckpointError` if a file states that it is one of more or fewer parts than ``parts``."""
    count = file.metadata.get("mp_world_size")
    if isinstance(count, int) and count != parts:
        raise CheckpointError(
            f"{file.path} was saved as one of {count} model-parallel parts; "
            f"{parts} {'is' if parts == 1 else 'are'} here.",
            "Give the iteration's folder, with mp_rank_00_model_states.pt and all other parts in it.",
        )


def join_parts(parts: Sequence[TensorSource]) -> TensorSource:
    """Return one source made of the parts, ordered by number; a single part is returned unchanged.

    Names, shapes and dtypes are compared now. Values that must be equal in every part are compared when they are read.
    Raises :class:`ConversionError`, naming the tensors, for parts that cannot be joined with certainty.
    """
    if not parts:
        raise CheckpointError("There are no model-parallel parts to join.")
    return parts[0] if len(parts) == 1 else JoinedTensors(parts)


class JoinedTensors:
    """Several parts as one source. See :func:`join_parts`."""

    def __init__(self, parts: Sequence[TensorSource]) -> None:
        self.parts = list(parts)
        self._splits: dict[str, _Split | None] = {}
        problems: list[str] = []
        tensors: dict[str, TensorInfo] = {}
        names = list(dict.fromkeys(name for part in self.parts for name in part.tensors))
        for name in names:
            holders = [number for number, part in enumerate(self.parts) if name in part.tensors]
            if len(holders) < len(self.parts):
                problems.append(f"{name}: only in part {', '.join(map(str, holders))}")
                continue
            infos = [part.tensors[name] for part in self.parts]
            problem = _split_problem(name, infos)
            if problem:
                problems.append(f"{name}: {problem}")
                continue
            self._splits[name] = _split_of(name)
            tensors[name] = _joined_info(infos, self._splits[name])
        problems += _layer_problems(tensors)
        if problems:
            raise ConversionError(
                f"The {len(self.parts)} model-parallel parts cannot be joined:\n{format_list(problems)}",
                _MERGE_WITH_SAT,
            )
        self.tensors: Mapping[str, TensorInfo] = tensors

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, a copy if it is joined. Raises :class:`ConversionError` if an unsplit tensor differs."""
        values = [part.read(name) for part in self.parts]
        split = self._splits[name]
        if split is None:
            for number, value in enumerate(values[1:], 1):
                if not _equal_bits(values[0], value):
                    raise ConversionError(
                        f"{name} differs between the model-parallel parts 0 and {number}, and cogflow does not know it "
                        "to be split.",
                        _MERGE_WITH_SAT,
                    )
            return values[0]
        blocks = [value.chunk(split.stride, split.dim) for value in values]
        return torch.cat([block[number] for number in range(split.stride) for block in blocks], split.dim)


def _layer_key(name: str) -> tuple[str, str] | None:
    """Return (linear layer, weight or bias) of a tensor in a transformer layer, ``None`` for other tensors."""
    match = _LAYER.fullmatch(name)
    return (match["linear"], match["kind"]) if match else None


def _split_of(name: str) -> _Split | None:
    key = _layer_key(name)
    return _SPLITS.get(key) if key else None


def _split_problem(name: str, infos: list[TensorInfo]) -> str:
    """Return why it is unknown how a tensor's parts are joined; empty if it is known."""
    shapes = [info.shape for info in infos]
    if len(set(shapes)) > 1:
        return f"shapes {', '.join(map(str, shapes))}"
    if len({info.dtype for info in infos}) > 1:
        return f"dtypes {', '.join(str(info.dtype) for info in infos)}"
    key = _layer_key(name)
    if key is None or key in _NOT_SPLIT:
        return ""
    split = _SPLITS.get(key)
    if split is None:
        return "it is unknown how SAT splits it"
    if len(shapes[0]) != (2 if key[1] == "weight" else 1):
        return f"{shapes[0]} is no shape of a linear layer"
    if shapes[0][split.dim] % split.stride:
        return f"{shapes[0][split.dim]} rows do not divide into queries, keys and values of equal size"
    return ""


def _joined_info(infos: list[TensorInfo], split: _Split | None) -> TensorInfo:
    if split is None:
        return infos[0]
    shape = list(infos[0].shape)
    shape[split.dim] *= len(infos)
    return replace(infos[0], shape=tuple(shape))


def _layer_problems(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the joined layers whose shapes do not fit together.

    This finds tensors that every part holds whole, and layers with fewer keys than queries.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in tensors.items():
        if (match := _LAYER.fullmatch(name)) and match["kind"] == "weight":
            shapes.setdefault(match["block"], {})[match["linear"]] = info.shape
    problems = []
    for block, layer in shapes.items():
        qkv, dense = layer.get("query_key_value"), layer.get("dense")
        if qkv and dense and (dense[0] != dense[1] or qkv != (3 * dense[0], dense[0])):
            problems.append(f"{block}*: joined to query_key_value {qkv} and dense {dense}, which do not fit")
        up, down = layer.get("dense_h_to_4h"), layer.get("dense_4h_to_h")
        if up and down and (up != down[::-1] or up[0] != 4 * up[1]):
            problems.append(f"{block}*: joined to dense_h_to_4h {up} and dense_4h_to_h {down}, which do not fit")
    return problems


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors are equal to the bit. NaN equals NaN."""
    return bool(torch.equal(a, b)) or bool(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )
