"""Write safetensors as a stream: no shard is ever held in memory, and every byte is hashed on its way to the disk.

safetensors' own ``save_file`` wants all tensors of a file at once. The format is a length, a JSON header with every tensor's
place, and the values (github.com/huggingface/safetensors, README): all of that is known before the first value is read. What is
written here equals ``save_file`` byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from cogflow.errors import ConfigError
from cogflow.files.uncached_io import UncachedWriter

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
# safetensors lays tensors out by dtype, the widest first (I64 before F64), and by name within a dtype.
ORDER = ["I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL"]
METADATA = {"format": "pt"}

Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Shards:
    """Which tensors go into which file: file name -> tensor names, in the order in which they lie there."""

    files: dict[str, list[str]]
    index: dict[str, Any] | None

    def order(self) -> list[str]:
        """Every tensor, in writing order."""
        return [name for names in self.files.values() for name in names]


def split(specs: Mapping[str, Spec], stem: str, max_shard_size: str) -> Shards:
    """Deal tensors, in the order given, into files of at most ``max_shard_size``, named as diffusers names them.

    Raises :class:`ConfigError` for a size that is none.
    """
    plan = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in specs.items()}
    try:
        dealt = split_torch_state_dict_into_shards(
            plan, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ConfigError(
            f"stage.max_shard_size={max_shard_size}: {error}", "Give a number and a unit, such as 5GB or 500MB."
        ) from error
    files = {
        file: sorted(names, key=lambda name: _place(name, specs[name]))
        for file, names in dealt.filename_to_tensors.items()
    }
    index = {"metadata": dealt.metadata, "weight_map": dealt.tensor_to_filename} if dealt.is_sharded else None
    return Shards(files, index)


def header(names: Sequence[str], specs: Mapping[str, Spec]) -> bytes:
    """Everything before the first value."""
    entries: dict[str, Any] = {"__metadata__": METADATA}
    at = 0
    for name in names:
        dtype, shape = specs[name]
        end = at + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _place(name: str, spec: Spec) -> tuple[int, str]:
    return ORDER.index(NAMES[spec[0]]), name


class Stream:
    """A file being written by a thread that hashes what it writes; the caller reads and casts the next piece meanwhile."""

    PIECES = 4

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digest = hashlib.sha256()
        self._pieces: queue.Queue[memoryview | None] = queue.Queue(maxsize=self.PIECES)
        self._error: BaseException | None = None
        self._file = UncachedWriter(path)
        self._thread = threading.Thread(target=self._work, name=f"write {path.name}", daemon=True)
        self._thread.start()

    def write(self, piece: bytes | memoryview) -> None:
        """Hand over a piece; it must not be changed afterwards. Raises what an earlier write raised."""
        if self._error is not None:
            raise self._error
        self._pieces.put(memoryview(piece))

    def close(self) -> str:
        """Wait until all is written; the sha256 of the file."""
        self._pieces.put(None)
        self._thread.join()
        try:
            self._file.close()
        except OSError as error:
            self._error = self._error or error
        if self._error is not None:
            raise self._error
        return self.digest.hexdigest()

    def _work(self) -> None:
        while (piece := self._pieces.get()) is not None:
            if self._error is not None:
                continue  # keep taking, so that the caller never waits for a place
            try:
                self.digest.update(piece)
                self._file.write(piece)
            except BaseException as error:  # noqa: BLE001 - raised again by write() or close()
                self._error = error


def raw(values: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return memoryview(values.flatten().view(torch.uint8).numpy()).cast("B")
