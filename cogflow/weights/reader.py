"""Read a diffusers component's safetensors one tensor at a time. Nothing is unpickled and nothing is read outside its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cogflow.errors import CheckpointError, DataError
from cogflow.files.paths import contained

STEM = "diffusion_pytorch_model"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


class WeightsFolder:
    """The tensors of one component folder, by name. Opening reads the headers alone; ``read`` maps one tensor at a time.

    Raises :class:`CheckpointError`, naming the file, for weights that are missing, truncated, not safetensors, outside of the
    folder, or at odds with their index.
    """

    def __init__(self, folder: Path, stem: str = STEM) -> None:
        self.folder = Path(folder)
        self.files, index = _files(self.folder, stem)
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._mapped: dict[Path, torch.Tensor] = {}
        for file in self.files:
            for info, place in _header(file):
                if info.name in self.tensors:
                    raise CheckpointError(
                        f"{info.name} is in two files: {self.tensors[info.name].file} and {file}.", _AGAIN
                    )
                self.tensors[info.name], self._places[info.name] = info, place
        if index is not None:
            _agree(self.folder, index, self.tensors)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file: it costs memory only where it is touched.

        ``safe_open`` would map the file once more for every tensor and read its first page, and with that, as kernels read ahead,
        half of an 11 GB model where only names were wanted.
        """
        info, (start, end) = self.tensors[name], self._places[name]
        if start == end:
            return torch.empty(info.shape, dtype=info.dtype)
        if info.file not in self._mapped:
            self._mapped[info.file] = torch.from_file(
                str(info.file), shared=False, size=info.file.stat().st_size, dtype=torch.uint8
            )
        values = self._mapped[info.file][start:end]
        if start % info.dtype.itemsize:  # other writers need not align
            values = values.clone()
        return values.view(info.dtype).reshape(info.shape)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor), by name, one at a time."""
        for name in sorted(self.tensors):
            yield name, self.read(name)


_AGAIN = "Copy or save this folder again."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; :class:`CheckpointError` when it is missing or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.", _AGAIN) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", _AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.", _AGAIN)
    return value


def contained_file(folder: Path, name: str) -> Path:
    """A file named by an index or found in a component folder, kept inside that folder.

    Hugging Face's cache keeps every file as a link from ``snapshots/`` into ``blobs/``; links that stay inside of one cached
    repository are followed. Raises :class:`CheckpointError`.
    """
    try:
        if len(PurePosixPath(name).parts) == 1:
            place = Path(folder).absolute()
            for parent in (place, *place.parents):
                if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
                    return contained(parent.parent, str((place / name).relative_to(parent.parent)))
        return contained(folder, name)
    except DataError as error:
        raise CheckpointError(
            f"{folder}: {error.message}", "Every file of a component lies in its own folder."
        ) from error


def _files(folder: Path, stem: str) -> tuple[list[Path], dict[str, str] | None]:
    single, index_path = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file() and index_path.is_file():
        raise CheckpointError(
            f"{folder} holds {single.name} and an index of shards: which of them is meant is unclear.",
            "Remove the one that is old.",
        )
    if single.is_file():
        return [contained_file(folder, single.name)], None
    if not index_path.is_file():
        raise CheckpointError(
            f"{folder} holds no {single.name} and no {index_path.name}.",
            "cogflow reads safetensors only, never pickled weights (.bin, .pt).",
        )
    index = read_json(index_path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
        raise CheckpointError(f"{index_path} has no weight_map of tensor names to files.", _AGAIN)
    shards = {shard: contained_file(folder, shard) for shard in sorted(set(index.values()))}
    for shard, path in shards.items():
        if not path.is_file():
            raise CheckpointError(f"{folder / shard} is missing; {index_path.name} names it.", _AGAIN)
    return list(shards.values()), index


def _agree(folder: Path, index: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    problems = [
        f"{name}: not in {shard}"
        for name, shard in sorted(index.items())
        if name not in tensors or tensors[name].file.name != Path(shard).name
    ]
    problems += [
        f"{name}: in {tensors[name].file.name}, not in the index" for name in sorted(tensors.keys() - index.keys())
    ]
    if problems:
        raise CheckpointError(f"{folder}: index and shards disagree.\n" + listed(problems), _AGAIN)


def _header(path: Path) -> list[tuple[TensorInfo, tuple[int, int]]]:
    """Each tensor with the place of its bytes in the file: from, up to."""
    with _open(path) as file:  # checks that the header is sound and the file as long as it says
        names = list(file.keys())
    with path.open("rb") as plain:
        length = int.from_bytes(plain.read(8), "little")
        entries = json.loads(plain.read(length))
    found = []
    for name in names:
        entry = entries[name]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(f"{path}: {name} is of type {entry['dtype']}, which cogflow does not read.")
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        found.append((TensorInfo(name, tuple(entry["shape"]), dtype, path), (start, end)))
    return found


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}", _AGAIN) from error


def listed(problems: list[str], most: int = 20) -> str:
    """One indented line each, the first ``most`` of them."""
    rest = len(problems) - most
    return "\n".join(f"  {problem}" for problem in problems[:most]) + (f"\n  and {rest} more" if rest > 0 else "")
