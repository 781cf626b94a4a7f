"""Write weights as streams: tensors are read, cast, measured, hashed and written one by one, in a few chunks of
memory.

``write_safetensors`` writes a component's safetensors, ``write_torch_file`` a .pt file. The same input gives the same
bytes. safetensors' own ``save_file`` needs all tensors of a file in memory. The format is a length, a JSON header
with every tensor's byte range, and the values (github.com/huggingface/safetensors, README), so the header can be
written before any value is read. The files equal those of ``save_file`` byte for byte.

``CastStatistics`` casts a tensor chunk by chunk and measures what the cast changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import queue
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch._subclasses.fake_tensor import FakeTensorMode

from cogflow.errors import ConfigError
from cogflow.files.record_io import JsonObject
from cogflow.files.uncached_io import UncachedWriter
from cogflow.records.export_records import TensorStatistics
from cogflow.weights.tensor_source import SAFETENSORS_DTYPES

PIECE = 1 << 22
"""Number of values that are cast and written together."""

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

DTYPE_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
"""safetensors orders tensors by dtype, the widest first (I64 before F64), and by name within a dtype."""

TensorSpec = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a written tensor."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to write.

    ``dtype`` is the dtype that ``produce`` returns, before the cast. ``sources`` and ``operation`` state what it is
    made of.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    produce: Callable[[], torch.Tensor]
    sources: tuple[str, ...] = ()
    operation: str = "copy"

    def target(self, dtype: torch.dtype | None) -> torch.dtype:
        """Return the dtype it is written in: ``dtype``, or its own if ``dtype`` is ``None`` or it holds integers."""
        return dtype if dtype is not None and self.dtype.is_floating_point else self.dtype

    def bytes(self, dtype: torch.dtype | None) -> int:
        """Return its size in bytes when written in ``dtype``."""
        return math.prod(self.shape) * int(self.target(dtype).itemsize)


@dataclass(frozen=True)
class SafetensorsFormat:
    """The place and options of a written component.

    ``dtype``: cast floating tensors to it, ``None`` to keep theirs. ``stem``: file name without suffix.
    ``max_shard_size``: a number and a unit, such as 5GB. ``metadata``: the header's ``__metadata__``, in this order
    (safetensors' ``save_file`` writes it in random order).
    """

    folder: Path
    dtype: torch.dtype | None
    stem: str
    max_shard_size: str
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})


def write_safetensors(
    tensors: list[PlannedTensor],
    output: SafetensorsFormat,
    on_tensor: Callable[[TensorStatistics], None],
    on_file: Callable[[Path, str], None] = lambda path, sha256: None,
) -> dict[str, str]:
    """Write ``tensors`` as one file ``<stem>.safetensors``, or as shards with an index, named as diffusers names
    them.

    ``on_tensor`` is called after each tensor, ``on_file`` with path and sha256 after each file. Returns sha256 by
    file name, without the index. Raises :class:`ConfigError` for a shard size that cannot be parsed.
    """
    specs: Mapping[str, TensorSpec] = {tensor.name: (tensor.target(output.dtype), tensor.shape) for tensor in tensors}
    by_name = {tensor.name: tensor for tensor in tensors}
    plan = plan_shards(specs, output.stem, output.max_shard_size)
    output.folder.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for file, names in plan.files.items():
        path = output.folder / file
        writer = HashingWriter(path)
        try:
            writer.write(_safetensors_header(names, specs, output.metadata))
            with one_thread():
                for name in names:
                    on_tensor(stream_tensor(by_name[name], specs[name][0], writer))
        finally:
            hashes[file] = writer.close()
        on_file(path, hashes[file])
    if plan.index is not None:
        text = json.dumps(plan.index, indent=2, sort_keys=True) + "\n"
        (output.folder / f"{output.stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    return hashes


@dataclass(frozen=True)
class ShardPlan:
    """``files``: file name to the names of its tensors in their order. ``index``: content of the index, ``None`` for
    one file."""

    files: dict[str, list[str]]
    index: JsonObject | None


def plan_shards(specs: Mapping[str, TensorSpec], stem: str, max_shard_size: str) -> ShardPlan:
    """Assign tensors, in the given order, to files of at most ``max_shard_size``, named as diffusers names them."""
    on_meta = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in specs.items()}
    try:
        shards = split_torch_state_dict_into_shards(
            on_meta, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ConfigError(
            f"stage.max_shard_size={max_shard_size}: {error}", "Give a number and a unit, such as 5GB or 500MB."
        ) from error

    def sort_key(name: str) -> tuple[int, str]:
        return DTYPE_ORDER.index(DTYPE_NAMES[specs[name][0]]), name

    files = {file: sorted(names, key=sort_key) for file, names in shards.filename_to_tensors.items()}
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename} if shards.is_sharded else None
    return ShardPlan(files, index)


def _safetensors_header(names: Sequence[str], specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Return everything in the file before the first value."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name in names:
        dtype, shape = specs[name]
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ByteWriter(Protocol):
    """Anything that tensors can be streamed to."""

    def write(self, piece: memoryview, /) -> object: ...


class HashingWriter:
    """A file written and hashed by a thread, while the caller reads and casts the next piece."""

    QUEUE_LENGTH = 4

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = hashlib.sha256()
        self._pieces: queue.Queue[memoryview | None] = queue.Queue(maxsize=self.QUEUE_LENGTH)
        self._error: BaseException | None = None
        self._file = UncachedWriter(path)
        self._thread = threading.Thread(target=self._work, name=f"write {path.name}", daemon=True)
        self._thread.start()

    def write(self, piece: bytes | memoryview) -> None:
        """Queue a piece, which must not be changed afterwards. Raises the error of an earlier write."""
        if self._error is not None:
            raise self._error
        self._pieces.put(memoryview(piece))

    def close(self) -> str:
        """Wait until everything is written and return the sha256 of the file. Raises the error of a failed write."""
        self._pieces.put(None)
        self._thread.join()
        try:
            self._file.close()
        except OSError as error:
            self._error = self._error or error
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def _work(self) -> None:
        while (piece := self._pieces.get()) is not None:
            if self._error is not None:
                continue  # empty the queue, so that the caller never blocks on it
            try:
                self._digest.update(piece)
                self._file.write(piece)
            except BaseException as error:  # noqa: BLE001 - raised again by write() or close()
                self._error = error


def stream_tensor(tensor: PlannedTensor, dtype: torch.dtype, writer: ByteWriter) -> TensorStatistics:
    """Produce one tensor, cast it to ``dtype``, write its bytes piece by piece, and return its statistics."""
    values = tensor.produce()
    if tuple(values.shape) != tensor.shape or values.dtype != tensor.dtype:
        raise RuntimeError(
            f"{tensor.name}: {torch_dtype_name(values.dtype)} {list(values.shape)} was made, "
            f"{torch_dtype_name(tensor.dtype)} {list(tensor.shape)} was planned"
        )
    statistics = CastStatistics(tensor.dtype, dtype)
    before = hashlib.sha256()
    after = hashlib.sha256()
    for piece in values.detach().contiguous().reshape(-1).split(PIECE):
        cast = statistics.cast(piece)
        data = _raw_bytes(cast)
        writer.write(data)
        after.update(data)
        if dtype != tensor.dtype:
            before.update(_raw_bytes(piece))
    sha256 = after.hexdigest()
    sha256_in = before.hexdigest() if dtype != tensor.dtype else sha256
    return statistics.result(
        tensor.name, list(tensor.sources), tensor.operation, list(tensor.shape), sha256_in=sha256_in, sha256=sha256
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch on one thread. A chunk is too small to gain from more, and waiting OpenMP threads occupy the cores
    that hash and write."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _raw_bytes(values: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without a copy."""
    return values.flatten().view(torch.uint8).numpy().data.cast("B")


def write_torch_file(
    path: Path,
    tensors: list[PlannedTensor],
    key: str,
    beside: JsonObject,
    dtype_of: Callable[[PlannedTensor], torch.dtype],
    on_tensor: Callable[[TensorStatistics], None],
) -> None:
    """Write ``{key: {name: tensor, ...}, **beside}`` as ``torch.save`` would, each tensor cast to
    ``dtype_of(tensor)``.

    torch writes the file with empty ranges for the values, which are then filled one tensor at a time. The zip's
    checksums of the values stay unset, as with torch's ``compute_crc32=False``; ``torch.load`` does not read them.
    """
    with FakeTensorMode():
        fakes = {tensor.name: torch.empty(tensor.shape, dtype=dtype_of(tensor)) for tensor in tensors}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({key: fakes, **beside}, path)
    # torch numbers storages in the order of pickling: the weights first, then any tensor in ``beside``.
    with path.open("rb") as file:
        offsets = _storage_offsets(path, file, len(tensors))
    with contextlib.closing(UncachedWriter(path, "r+b")) as writer, one_thread():
        for offset, tensor in zip(offsets, tensors, strict=True):
            writer.seek(offset)
            on_tensor(stream_tensor(tensor, dtype_of(tensor), writer))


def _storage_offsets(path: Path, file: IO[bytes], count: int) -> list[int]:
    """Return the byte offsets of the values of storages 0 to ``count`` - 1 in a torch file."""
    with zipfile.ZipFile(path) as archive:
        headers = {entry.filename.partition("/")[2]: entry.header_offset for entry in archive.infolist()}
    offsets = []
    for number in range(count):
        start = headers[f"data/{number}"]
        file.seek(start)
        # A zip's local header has 30 bytes; its last two fields are the lengths of the name and of the extra field.
        name_length, extra_length = struct.unpack("<HH", file.read(30)[26:30])
        offsets.append(start + 30 + name_length + extra_length)
    return offsets


# Statistics of a tensor before and after the cast

CHUNK = 1 << 16
"""Values processed together. Their copies in double precision fit into a core's cache: whole tensors took 20 times as
long."""

NARROWER = {
    torch.float32: (torch.bfloat16, torch.float16),
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
}
"""Dtype to smaller dtypes that its values may have been rounded to before they were stored."""


@dataclass
class RunningMoments:
    """Mean, standard deviation and largest magnitude of the finite values added so far."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    absmax: float = 0.0
    nonfinite: int = 0

    def add(self, values: torch.Tensor) -> None:
        """Add float64 ``values`` ``[n]``."""
        if values.numel() == 0:
            return
        squares = float(torch.dot(values, values))
        if squares - squares != 0.0:  # the values hold NaN or infinity, or their squares overflow a double
            finite = values[values.isfinite()]
            self.nonfinite += values.numel() - finite.numel()
            values = finite
            squares = float(torch.dot(finite, finite))
            if values.numel() == 0:
                return
        low, high = torch.aminmax(values)
        self.count += values.numel()
        self.total += float(values.sum())
        self.squares += squares
        self.absmax = max(self.absmax, -float(low), float(high))

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """The standard deviation of all values, not of a sample (divisor n)."""
        return max(0.0, self.squares / self.count - self.mean**2) ** 0.5 if self.count else 0.0


@dataclass
class CastStatistics:
    """Cast one tensor from ``dtype_in`` to ``dtype_out`` piece by piece and collect its statistics."""

    dtype_in: torch.dtype
    dtype_out: torch.dtype
    before: RunningMoments = field(default_factory=RunningMoments)
    after: RunningMoments = field(default_factory=RunningMoments)
    changed: float = 0.0
    relative: float = 0.0
    became_inf: int = 0
    became_zero: int = 0
    became_subnormal: int = 0

    def __post_init__(self) -> None:
        self.narrower = list(NARROWER.get(self.dtype_in, ()))

    def cast(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``values`` ``[n]`` in ``dtype_out`` and add them to the statistics."""
        if self.dtype_in == self.dtype_out:
            for chunk in values.split(CHUNK):
                self.before.add(chunk.double())
                self._exclude_narrower(chunk)
            return values
        return torch.cat([self._cast_chunk(chunk) for chunk in values.split(CHUNK)])

    def _cast_chunk(self, chunk: torch.Tensor) -> torch.Tensor:
        result = chunk.to(self.dtype_out)
        old = chunk.double()
        new = result.double()
        nonfinite_in = self.before.nonfinite
        self.before.add(old)
        nonfinite_out = self.after.nonfinite
        self.after.add(new)
        self.became_inf += (self.after.nonfinite - nonfinite_out) - (self.before.nonfinite - nonfinite_in)
        self._exclude_narrower(chunk)
        if not torch.equal(old, new):
            self._count_changes(old, new)
        return result

    def _count_changes(self, old: torch.Tensor, new: torch.Tensor) -> None:
        difference = (new - old).abs_()
        finite = difference.isfinite()
        if not bool(finite.all()):
            difference = difference.where(finite, 0.0)
        self.changed = max(self.changed, float(difference.max()))
        nonzero = old != 0
        self.relative = max(self.relative, float(torch.where(nonzero & finite, difference / old.abs(), 0.0).max()))
        self.became_zero += int(((new == 0) & nonzero).sum())
        if self.dtype_out.is_floating_point:
            tiny_in = torch.finfo(self.dtype_in).tiny if self.dtype_in.is_floating_point else 0.0
            subnormal = (new.abs() < torch.finfo(self.dtype_out).tiny) & (new != 0) & (old.abs() >= tiny_in)
            self.became_subnormal += int(subnormal.sum())

    def _exclude_narrower(self, chunk: torch.Tensor) -> None:
        """Remove the narrower dtypes that cannot hold every value of ``chunk``."""
        for dtype in list(self.narrower):
            if not torch.equal(chunk.to(dtype).to(chunk.dtype), chunk):
                self.narrower.remove(dtype)

    def result(
        self, name: str, sources: list[str], operation: str, shape: list[int], *, sha256_in: str, sha256: str
    ) -> TensorStatistics:
        """Return the statistics of all values cast so far, with the tensor's description."""
        after = self.before if self.dtype_in == self.dtype_out else self.after
        # If bf16 and fp16 both hold every value (only zeros, say), no rounding is evident. NARROWER lists bf16, the
        # usual dtype of training, first.
        rounded = bool(self.narrower) and self.before.absmax > 0
        return TensorStatistics(
            name=name,
            sources=sources,
            operation=operation,
            shape=shape,
            dtype_in=torch_dtype_name(self.dtype_in),
            dtype_out=torch_dtype_name(self.dtype_out),
            mean_in=self.before.mean,
            std_in=self.before.std,
            absmax_in=self.before.absmax,
            mean_out=after.mean,
            std_out=after.std,
            absmax_out=after.absmax,
            changed=self.changed,
            relative=self.relative,
            nonfinite=self.before.nonfinite,
            became_inf=self.became_inf,
            became_zero=self.became_zero,
            became_subnormal=self.became_subnormal,
            holds_only=torch_dtype_name(self.narrower[0]) if rounded else None,
            sha256_in=sha256_in,
            sha256=sha256,
        )


def torch_dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype without the module, such as ``float32``."""
    return str(dtype).removeprefix("torch.")
