"""Write a component's tensors one by one: read, cast, counted, hashed and streamed into shards. Costs a few chunks of memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from cogflow.weights.cast_statistics import CastStatistics, TensorFacts, short
from cogflow.weights.safetensors_stream import Spec, Stream, header, raw, split

PIECE = 1 << 22
"""Values handed on together."""


class Sink(Protocol):
    def write(self, piece: memoryview, /) -> Any: ...


@dataclass(frozen=True)
class Output:
    """One tensor to write: what it is, what it is made of, and how to get it (in ``dtype``, before the cast)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    produce: Callable[[], torch.Tensor]
    sources: tuple[str, ...] = ()
    operation: str = "copy"

    def target(self, dtype: torch.dtype | None) -> torch.dtype:
        """What it is cast to: ``dtype``, or what it is for None and for integers."""
        return dtype if dtype is not None and self.dtype.is_floating_point else self.dtype

    def bytes(self, dtype: torch.dtype | None) -> int:
        return math.prod(self.shape) * self.target(dtype).itemsize


def write_weights(
    outputs: list[Output],
    dtype: torch.dtype | None,
    folder: Path,
    stem: str,
    max_shard_size: str,
    report: Callable[[TensorFacts], None],
    closed: Callable[[Path, str], None] = lambda path, sha256: None,
) -> dict[str, str]:
    """Write ``outputs``, cast to ``dtype`` (None: as they are; integers are never cast), into ``folder``.

    One file ``<stem>.safetensors``, or shards of at most ``max_shard_size`` (such as 5GB) and their index, as diffusers writes
    them. ``report`` is called once per tensor, ``closed`` with path and sha256 once per shard. Returns sha256 by file name of the
    shards. The same input gives the same bytes.
    """
    specs: Mapping[str, Spec] = {output.name: (output.target(dtype), output.shape) for output in outputs}
    by_name = {output.name: output for output in outputs}
    shards = split(specs, stem, max_shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for file, names in shards.files.items():
        stream = Stream(folder / file)
        try:
            stream.write(header(names, specs))
            with one_thread():
                for name in names:
                    report(stream_tensor(by_name[name], specs[name][0], stream))
        finally:
            hashes[file] = stream.close()
        closed(folder / file, hashes[file])
    if shards.index is not None:
        text = json.dumps(shards.index, indent=2, sort_keys=True) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    return hashes


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch from splitting work over cores. A chunk is too small for it to pay, and a waiting OpenMP thread keeps its core from
    those that hash and write."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def stream_tensor(output: Output, dtype: torch.dtype, stream: Sink) -> TensorFacts:
    """Produce one tensor, cast it to ``dtype`` and write its bytes to ``stream``, piece by piece; its facts."""
    tensor = output.produce()
    if tuple(tensor.shape) != output.shape or tensor.dtype != output.dtype:
        raise RuntimeError(
            f"{output.name}: {short(tensor.dtype)} {list(tensor.shape)} was made, {list(output.shape)} was planned"
        )
    passing = CastStatistics(output.dtype, dtype)
    before, after = hashlib.sha256(), hashlib.sha256()
    for piece in tensor.detach().contiguous().reshape(-1).split(PIECE):
        cast = passing.cast(piece)
        data = raw(cast)
        stream.write(data)
        after.update(data)
        if dtype != output.dtype:
            before.update(raw(piece))
    sha256 = after.hexdigest()
    sha256_in = before.hexdigest() if dtype != output.dtype else sha256
    return passing.facts(output.name, list(output.sources), output.operation, list(output.shape), sha256_in, sha256)
