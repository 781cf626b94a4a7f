"""Write a .pt file as a stream: torch lays the file out with holes for the values, which are then filled one tensor at a time."""

from __future__ import annotations

import contextlib
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cogflow.files.uncached_io import UncachedWriter
from cogflow.weights.cast_statistics import TensorFacts
from cogflow.weights.writer import Output, one_thread, stream_tensor


def write_torch(
    path: Path,
    outputs: list[Output],
    key: str,
    beside: dict[str, Any],
    dtype: Callable[[Output], torch.dtype],
    report: Callable[[TensorFacts], None],
) -> None:
    """Write ``{key: {name: tensor, ...}, **beside}`` as ``torch.save`` would, each tensor cast to what ``dtype`` says.

    Costs a few chunks of memory whatever the size. The zip's checksums of the values stay unset, as with torch's own
    ``compute_crc32=False``: ``torch.load`` does not look at them. The same input gives the same bytes.
    """
    with FakeTensorMode():
        fakes = {output.name: torch.empty(output.shape, dtype=dtype(output)) for output in outputs}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({key: fakes, **beside}, path)
    # Values that are not weights (beside) come after the weights, and torch numbers storages in the order it meets them.
    with open(path, "rb") as file:
        places = _places(path, file, len(outputs))
    with contextlib.closing(UncachedWriter(path, "r+b")) as values, one_thread():
        for place, output in zip(places, outputs, strict=True):
            values.seek(place)
            report(stream_tensor(output, dtype(output), values))


def _places(path: Path, file: IO[bytes], count: int) -> list[int]:
    """Where the values of storages 0 to ``count`` - 1 begin."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename.partition("/")[2]: entry.header_offset for entry in archive.infolist()}
    places = []
    for number in range(count):
        file.seek(start := entries[f"data/{number}"])
        # Of a zip's local header (30 bytes) the last two fields are the lengths of the name and of what follows it.
        name, extra = struct.unpack("<HH", file.read(30)[26:30])
        places.append(start + 30 + name + extra)
    return places
