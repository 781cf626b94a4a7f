"""Sources of tensors: what every source offers, a renaming view, and a folder of safetensors.

Names, shapes and dtypes are known when a source is opened; values are read one tensor at a time. Safetensors are never
unpickled, and no file outside the folder is read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeGuard

import torch
from safetensors import SafetensorError, safe_open

from cogflow.errors import CheckpointError, DataError, format_list
from cogflow.files.bounded_parsing import parse_json, read_json_file
from cogflow.files.contained_files import open_regular
from cogflow.files.paths import contained

STEM = "diffusion_pytorch_model"
"""Name of diffusers' weight files without their suffix."""

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's name of a dtype (github.com/huggingface/safetensors, README) to torch's dtype."""

MOST_HEADER_BYTES = 100_000_000
"""Bytes of a header, the limit of the format itself."""

_SAVE_AGAIN = "Copy or save this folder again."


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape, dtype and file of one tensor, as a file's header states them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


class TensorSource(Protocol):
    """A safetensors folder, a mapped .pt file, the files of a sharded checkpoint, or a view of one of them."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, known without reading a value."""

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, mapped from its file where possible: untouched values cost no memory."""


class RenamedTensors:
    """A view of some tensors of ``source`` under other names. ``names``: new name to name in ``source``."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self.source = source
        self.names = dict(names)
        self.tensors: Mapping[str, TensorInfo] = {
            new: replace(source.tensors[old], name=new) for new, old in self.names.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(self.names[name])


class WeightsFolder:
    """The tensors of one component folder by name, from one safetensors file or from shards with an index.

    Opening reads only the headers. Raises :class:`CheckpointError`, naming the file, for weights that are missing,
    truncated, not safetensors, outside the folder, or in conflict with their index.
    """

    def __init__(self, folder: Path, stem: str = STEM) -> None:
        self.folder = Path(folder)
        self.files, index = _weight_files(self.folder, stem)
        self.tensors: dict[str, TensorInfo] = {}
        self._byte_ranges: dict[str, tuple[int, int]] = {}
        self._mapped: dict[Path, torch.Tensor] = {}
        for file in self.files:
            for info, byte_range in _read_header(file):
                if info.name in self.tensors:
                    raise CheckpointError(
                        f"{info.name} is in two files: {self.tensors[info.name].file} and {file}.", _SAVE_AGAIN
                    )
                self.tensors[info.name] = info
                self._byte_ranges[info.name] = byte_range
        if index is not None:
            _check_index(self.folder, index, self.tensors)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, mapped from its file, so that untouched values cost no memory.

        Each file is mapped once. ``safe_open`` would map it again for every tensor and read its first page; with the
        kernel's read-ahead, listing the names of an 11 GB model would read half of it.
        """
        info = self.tensors[name]
        start, end = self._byte_ranges[name]
        if start == end:
            return torch.empty(info.shape, dtype=info.dtype)
        if info.file not in self._mapped:
            size = info.file.stat().st_size
            self._mapped[info.file] = torch.from_file(str(info.file), shared=False, size=size, dtype=torch.uint8)
        values = self._mapped[info.file][start:end]
        if start % info.dtype.itemsize:  # other programs may write unaligned tensors
            values = values.clone()
        return values.view(info.dtype).reshape(info.shape)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor), sorted by name, one tensor at a time."""
        for name in sorted(self.tensors):
            yield name, self.read(name)


def weights_fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return one SHA-256 over names, dtypes, shapes and bytes of ``tensors``, independent of order and of file layout.

    Equal fingerprints prove that two places hold the same weights. One tensor is in memory at a time.
    """
    lines = []
    for name, tensor in tensors:
        data = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data
        lines.append(fingerprint_line(name, str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(data).hexdigest()))
    return join_fingerprint(lines)


def fingerprint_line(name: str, dtype: str, shape: tuple[int, ...], sha256: str) -> str:
    """Return one tensor's contribution to a fingerprint. ``dtype`` is torch's full name, such as ``torch.float32``."""
    return f"{name} {dtype} {shape} {sha256}"


def join_fingerprint(lines: Iterable[str]) -> str:
    """Return the fingerprint of the weights whose :func:`fingerprint_line` results are ``lines``."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises :class:`CheckpointError` if the file is missing or holds no JSON
    object."""
    try:
        value = read_json_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.", _SAVE_AGAIN) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", _SAVE_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.", _SAVE_AGAIN)
    return value


def contained_file(folder: Path, name: str) -> Path:
    """Return the path of a file that an index or a listing of ``folder`` names. The file must be inside the folder.

    Hugging Face's cache stores every file as a link from ``snapshots/`` to ``blobs/``; links inside one cached
    repository are followed. Raises :class:`CheckpointError` for a name or a link that leads outside.
    """
    try:
        if len(PurePosixPath(name).parts) == 1:
            absolute = Path(folder).absolute()
            for parent in (absolute, *absolute.parents):
                if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
                    return contained(parent.parent, str((absolute / name).relative_to(parent.parent)))
        return contained(folder, name)
    except DataError as error:
        raise CheckpointError(
            f"{folder}: {error.message}", "Every file of a component must be in the component's own folder."
        ) from error


def _weight_files(folder: Path, stem: str) -> tuple[list[Path], dict[str, str] | None]:
    """Return the safetensors files of ``folder`` and, for shards, the index of tensor names to file names."""
    single = folder / f"{stem}.safetensors"
    index_path = folder / f"{stem}.safetensors.index.json"
    if single.is_file() and index_path.is_file():
        raise CheckpointError(
            f"{folder} holds both {single.name} and an index of shards; it is unclear which to read.",
            "Remove the older one.",
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
        raise CheckpointError(f"{index_path} has no weight_map of tensor names to files.", _SAVE_AGAIN)
    shards = {shard: contained_file(folder, shard) for shard in sorted(set(index.values()))}
    for shard, path in shards.items():
        if not path.is_file():
            raise CheckpointError(f"{folder / shard} is missing; {index_path.name} names it.", _SAVE_AGAIN)
    return list(shards.values()), index


def _check_index(folder: Path, index: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    problems = [
        f"{name}: not in {shard}"
        for name, shard in sorted(index.items())
        if name not in tensors or tensors[name].file.name != Path(shard).name
    ]
    problems += [
        f"{name}: in {tensors[name].file.name}, not in the index" for name in sorted(tensors.keys() - index.keys())
    ]
    if problems:
        raise CheckpointError(f"{folder}: index and shards disagree.\n" + format_list(problems), _SAVE_AGAIN)


def _read_header(path: Path) -> list[tuple[TensorInfo, tuple[int, int]]]:
    """Return each tensor of a file with the byte range (start, end) of its values."""
    try:
        # Opening checks that the header is valid and that the file has the length the header states.
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}", _SAVE_AGAIN) from error
    with open_regular(path) as plain:
        length = int.from_bytes(plain.read(8), "little")
        entries = _parse_header(plain.read(length), path)
    found = [_header_entry(name, entries.get(name), 8 + length, path) for name in names]
    _check_ranges(found, path)
    return found


def _parse_header(text: bytes, path: Path) -> dict[str, Any]:
    try:
        entries = parse_json(text, MOST_HEADER_BYTES)
    except ValueError as error:
        raise CheckpointError(f"{path} has a header that cannot be read: {error}", _SAVE_AGAIN) from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path} has a header that is no JSON object.", _SAVE_AGAIN)
    return entries


def _header_entry(name: str, entry: Any, offset: int, path: Path) -> tuple[TensorInfo, tuple[int, int]]:
    """Return the tensor that an ``entry`` of a header describes, and its byte range in the file."""
    shape, offsets = (entry.get("shape"), entry.get("data_offsets")) if isinstance(entry, dict) else (None, None)
    if not (_whole_numbers(shape) and _whole_numbers(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{path}: the header's entry of {name[:200]} has no shape and data_offsets.", _SAVE_AGAIN)
    dtype = SAFETENSORS_DTYPES.get(entry.get("dtype"))
    if dtype is None:
        raise CheckpointError(f"{path}: {name} is of type {entry.get('dtype')}, which cogflow does not read.")
    start, end = offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{path}: {name} of shape {shape} has {end - start} bytes; {math.prod(shape) * dtype.itemsize} are needed.",
            _SAVE_AGAIN,
        )
    return TensorInfo(name, tuple(shape), dtype, path), (offset + start, offset + end)


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 62 for number in value)


def _check_ranges(found: list[tuple[TensorInfo, tuple[int, int]]], path: Path) -> None:
    """Raise :class:`CheckpointError` for tensors that share bytes or reach beyond the end of the file."""
    size, last = path.stat().st_size, 0
    for info, (start, end) in sorted(found, key=lambda one: one[1]):
        if start < last or end > size:
            raise CheckpointError(
                f"{path}: {info.name} shares bytes with another tensor, or ends after the file.", _SAVE_AGAIN
            )
        last = end
