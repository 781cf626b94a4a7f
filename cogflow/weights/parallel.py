"""Join the parts of a model-parallel SAT checkpoint, ``mp_rank_00_model_states.pt`` and on, into one set of tensors.

How SAT splits is read from its ``sat/mpu/layers.py`` and ``sat/model/transformer.py`` (0.4.12): of each layer the fused
query_key_value is split by rows within each third, dense_h_to_4h by rows, dense and dense_4h_to_h by columns; their biases follow the
rows, or are kept whole. All else is the same in every part, so whatever is not must be something that cogflow does not know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cogflow.errors import CheckpointError, ConversionError
from cogflow.weights.reader import TensorInfo, listed
from cogflow.weights.tensors import Tensors
from cogflow.weights.torchfile import TorchFile

PART = re.compile(r"mp_rank_(\d+)_model_states\.pt")

_LAYER = re.compile(
    r"(?P<block>(?:.*\.)?transformer\.layers\.\d+\.(?:attention|mlp)\.)(?P<linear>\w+)\.(?:original\.)?(?P<kind>\w+)(?:\.\d+)?"
)
_UNSETTLED = "Merge the parts with SAT itself (MP1) and export the result."


@dataclass(frozen=True)
class _Split:
    """Along ``dim``, within each of ``stride`` equal stretches."""

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
_WHOLE = {("dense", "bias"), ("dense_4h_to_h", "bias")}


def model_parts(folder: Path) -> list[Path]:
    """The parts in an iteration's folder, by number; empty when there is none. :class:`CheckpointError` when a number is missing."""
    parts = {int(match[1]): path for path in folder.iterdir() if (match := PART.fullmatch(path.name))}
    missing = sorted(set(range(max(parts, default=-1) + 1)) - parts.keys())
    if missing:
        names = ", ".join(f"mp_rank_{number:02d}_model_states.pt" for number in missing[:8])
        raise CheckpointError(
            f"{folder} lacks {names}; it holds parts up to {max(parts)}.", "Copy every part of the checkpoint."
        )
    return [parts[number] for number in sorted(parts)]


def check_count(file: TorchFile, parts: int) -> None:
    """:class:`CheckpointError` when a file says that it is one of more or fewer parts than ``parts``."""
    count = file.metadata.get("mp_world_size")
    if isinstance(count, int) and count != parts:
        raise CheckpointError(
            f"{file.path} was saved as one of {count} model-parallel parts; {parts} {'is' if parts == 1 else 'are'} here.",
            "Give the iteration's folder, with all of mp_rank_00_model_states.pt and on in it.",
        )


def join(parts: Sequence[Tensors]) -> Tensors:
    """One source made of the parts, in the order of their numbers; a single part is given back as it is.

    Names, shapes and dtypes are compared now. Values that must be the same in every part are compared when they are read.
    Raises :class:`ConversionError`, naming the keys, for what cannot be joined for certain.
    """
    if not parts:
        raise CheckpointError("There are no model-parallel parts to join.")
    return parts[0] if len(parts) == 1 else Joined(parts)


class Joined:
    """See :func:`join`."""

    def __init__(self, parts: Sequence[Tensors]) -> None:
        self.parts = list(parts)
        self._splits: dict[str, _Split | None] = {}
        problems: list[str] = []
        tensors: dict[str, TensorInfo] = {}
        names = list(dict.fromkeys(name for part in self.parts for name in part.tensors))
        for name in names:
            having = [number for number, part in enumerate(self.parts) if name in part.tensors]
            if len(having) < len(self.parts):
                problems.append(f"{name}: only in part {', '.join(map(str, having))}")
                continue
            infos = [part.tensors[name] for part in self.parts]
            problem = _settle(name, infos, self._splits)
            if problem:
                problems.append(f"{name}: {problem}")
                continue
            tensors[name] = _joined_info(infos, self._splits[name])
        problems += _whole_layers(tensors)
        if problems:
            raise ConversionError(
                f"The {len(self.parts)} model-parallel parts cannot be joined:\n{listed(problems)}", _UNSETTLED
            )
        self.tensors: Mapping[str, TensorInfo] = tensors

    def read(self, name: str) -> torch.Tensor:
        """One tensor: a copy where it is joined. :class:`ConversionError` when what should be the same in all parts is not."""
        values = [part.read(name) for part in self.parts]
        split = self._splits[name]
        if split is None:
            for number, value in enumerate(values[1:], 1):
                if not _same(values[0], value):
                    raise ConversionError(
                        f"{name} differs between the model-parallel parts 0 and {number}, and cogflow does not know it to be split.",
                        _UNSETTLED,
                    )
            return values[0]
        pieces = [value.chunk(split.stride, split.dim) for value in values]
        return torch.cat([piece[stretch] for stretch in range(split.stride) for piece in pieces], split.dim)


def _settle(name: str, infos: list[TensorInfo], splits: dict[str, _Split | None]) -> str:
    """Note in ``splits`` how a tensor is split (``None``: not at all), or say why that is unclear."""
    shapes = [info.shape for info in infos]
    if len(set(shapes)) > 1:
        return f"shapes {', '.join(map(str, shapes))}"
    if len({info.dtype for info in infos}) > 1:
        return f"dtypes {', '.join(str(info.dtype) for info in infos)}"
    match = _LAYER.fullmatch(name)
    key = (match["linear"], match["kind"]) if match else ("", "")
    split = _SPLITS.get(key)
    if match and split is None and key not in _WHOLE:
        return "how SAT splits it is not settled"
    if split and len(shapes[0]) != (2 if key[1] == "weight" else 1):
        return f"{shapes[0]} is no shape of a linear layer"
    if split and shapes[0][split.dim] % split.stride:
        return f"{shapes[0][split.dim]} rows are no queries, keys and values of equal size"
    splits[name] = split
    return ""


def _joined_info(infos: list[TensorInfo], split: _Split | None) -> TensorInfo:
    if split is None:
        return infos[0]
    shape = list(infos[0].shape)
    shape[split.dim] *= len(infos)
    return replace(infos[0], shape=tuple(shape))


def _whole_layers(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Joined layers must fit: tensors that every part holds whole, and other numbers of keys than of queries, show here."""
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


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, so that NaN equals NaN."""
    return torch.equal(a, b) or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
