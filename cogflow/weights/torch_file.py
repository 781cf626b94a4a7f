"""Read the weights in ``.pt``, ``.bin`` and ``.ckpt`` files, as SAT, DeepSpeed and other trainers write them.

Files are opened with torch's restricted unpickler, which builds tensors and plain values and runs no code. The other
objects that trainers pickle beside their weights (numpy's random states, DeepSpeed's loss scaler) are listed here by
name and are read as :class:`InertObject`, without calling numpy or DeepSpeed. A file that needs any other class or
function is refused.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from cogflow.errors import CheckpointError, DataError, format_list
from cogflow.files.contained_files import open_regular
from cogflow.files.record_io import JsonObject, JsonValue
from cogflow.weights.tensor_source import TensorInfo

WRAPPERS = ("module", "model", "state_dict")
"""Keys that hold the weights: DeepSpeed and SAT; many trainers; Lightning and the published 3d-vae.pt."""

RANDOM_STATES = (
    "numpy.core.multiarray._reconstruct",  # numpy 1
    "numpy._core.multiarray._reconstruct",  # numpy 2
    "numpy.ndarray",
    "numpy.dtype",
)
"""Names in the pickle of ``numpy.random.get_state()``, which SAT stores as np_rng_state."""

LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of files from before torch 1.6: torch's magic number, pickled."""

_WEIGHT_DESCRIPTIONS = {
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
    "buffer_names",
}
"""DeepSpeed's keys that repeat or describe the weights; they are not metadata."""

MOST_PICKLE_BYTES = 1 << 26
"""Bytes of the pickle in a file, which describes the tensors. DeepSpeed's have less than 10 MB."""
MOST_VALUES = 10_000_000
"""Values that the pickle may stand for when every reference is counted."""
MOST_DEPTH = 100
"""Nested containers in a pickle."""
MOST_BITS = 256
"""Bits of a whole number. numpy's random states have 128."""

_MAX_METADATA_LENGTH = 4096
"""Largest length in JSON characters of a metadata value. Python's random state is longer."""

_SAVE_AGAIN = "Copy or download the file again."
_EXPECTED = f"Expected: tensors by name, alone or under one of {', '.join(WRAPPERS)}."

_DAMAGE_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
    ArithmeticError,
    struct.error,
)
"""Exceptions that torch's reader raises for damaged files; found by changing bytes at random in hundreds of files."""


class TorchFile:
    """The tensors of one file by name, as stored and mapped from the file.

    ``wrapper`` names what was unwrapped: ``none``, one key (``module``) or several (``state_dict/module``). ``*``
    marks a removed ``module.`` prefix of all names (``module/module.*``). ``metadata`` holds the wrapper and the
    small plain values beside the weights (``iteration``, ``global_steps``, ``ds_version``, ``mp_world_size``, ...).

    Raises :class:`CheckpointError`; see :func:`load_torch_file`.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        values, self.wrapper, beside = unwrap_state_dict(load_torch_file(self.path), self.path)
        self._values = {name: value.detach() for name, value in values.items() if isinstance(value, torch.Tensor)}
        _refuse_special_tensors(self._values, self.path)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, tuple(value.shape), value.dtype, self.path) for name, value in self._values.items()
        }
        others = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
        self.metadata: JsonObject = {**json_values(beside | others), "wrapper": self.wrapper}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor as stored. Tensors may share storage, and some may be non-contiguous views."""
        return self._values[name]


def _refuse_special_tensors(values: Mapping[str, torch.Tensor], path: Path) -> None:
    problems = [
        f"{name}: {value.layout}" for name, value in values.items() if value.layout != torch.strided or value.is_meta
    ]
    problems += [f"{name}: quantized" for name, value in values.items() if value.is_quantized]
    if problems:
        raise CheckpointError(
            f"{path} holds tensors of kinds that cogflow does not read:\n{format_list(problems)}",
            "Save them as plain tensors.",
        )


def unwrap_state_dict(content: Any, path: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Return the innermost state dict of a file's content, the wrapper's name, and the values beside the state dict.

    Raises :class:`CheckpointError` for content without tensors by name, or with weights under two keys.
    """
    wrappers: list[str] = []
    beside: dict[str, Any] = {}
    while True:
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors.", _EXPECTED)
        keys = [key for key in WRAPPERS if isinstance(content.get(key), Mapping) and _holds_tensors(content[key])]
        if not keys:
            break
        if len(keys) > 1:
            raise CheckpointError(
                f"{path} holds weights under {' and '.join(keys)}; it is unclear which to read.",
                "Save a file with one of them.",
            )
        beside |= {key: value for key, value in content.items() if key != keys[0]}
        wrappers.append(keys[0])
        content = content[keys[0]]
    names = _tensor_names(content, path)
    values = dict(content)
    if all(name.startswith("module.") for name in names):
        values = {name.removeprefix("module."): value for name, value in values.items()}
        wrappers.append("module.*")
    return values, "/".join(wrappers) or "none", beside


def _tensor_names(content: Mapping[Any, Any], path: Path) -> list[str]:
    names = [name for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)]
    if not names:
        entries = [f"{key!r}: {type(value).__name__}" for key, value in content.items()]
        found = (
            f"{path} holds no tensors by name. It holds:\n{format_list(entries, 8)}" if entries else f"{path} is {{}}."
        )
        raise CheckpointError(found, _EXPECTED)
    other_keys = [repr(key) for key in content if not isinstance(key, str)]
    if other_keys:
        raise CheckpointError(f"{path} has keys that are no text: {', '.join(other_keys[:5])}.", _EXPECTED)
    return names


def _holds_tensors(value: Mapping[Any, Any]) -> bool:
    """Return whether a dictionary holds a tensor, directly or under a wrapper key."""
    return any(isinstance(item, torch.Tensor) for item in value.values()) or any(
        isinstance(value.get(key), Mapping) and _holds_tensors(value[key]) for key in WRAPPERS
    )


def json_values(values: Mapping[str, Any]) -> dict[str, JsonValue]:
    """Return the values that JSON can hold and that are small enough to be metadata."""
    kept: dict[str, JsonValue] = {}
    for name, value in values.items():
        try:
            text = json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            continue
        is_metadata = isinstance(name, str) and name not in _WEIGHT_DESCRIPTIONS and len(text) <= _MAX_METADATA_LENGTH
        if value is not None and is_metadata:
            kept[name] = value
    return kept


class InertObject:
    """Placeholder for an object that is not built.

    ``args``: the arguments its constructor would have received; absent where the pickle makes it without one.
    """

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        """Ignore the pickled state."""


def load_torch_file(path: Path, inert: Iterable[str] = RANDOM_STATES) -> Any:
    """Return the content of a torch file, its tensors on the CPU and mapped (files from before torch 1.6 are copied).

    ``inert``: full names of classes and functions that are read as :class:`InertObject`. Raises
    :class:`CheckpointError` for files that are missing, empty, truncated or of another kind, and for files that need
    other classes or functions.
    """
    path = Path(path)
    mapped = _is_zip_format(path)
    try:
        with torch.serialization.safe_globals([(InertObject, name) for name in inert]):
            content = torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
    except UnpicklingError as error:
        raise _unpickling_refusal(path, str(error)) from error
    except MemoryError as error:
        raise CheckpointError(
            f"{path} does not fit into memory.", "Save it again with torch 1.6 or newer; such files are mapped."
        ) from error
    except _DAMAGE_ERRORS as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path} is damaged: {first_line}", _SAVE_AGAIN) from error
    if problem := _content_problem(content):
        raise CheckpointError(f"{path} is no checkpoint that can be read safely: {problem}.", _SAVE_AGAIN)
    return content


def _content_problem(content: Any) -> str:
    """Return why the objects of a file cannot be walked safely; empty when they can.

    A pickle may name an object many times, so that a few bytes stand for billions of values, and may contain itself.
    A tensor may have more values than its storage, by strides of 0.
    """
    sizes: dict[int, tuple[int, int]] = {}  # by object: values it stands for, nested levels
    entered: set[int] = set()
    pending: list[tuple[Any, bool]] = [(content, False)]
    while pending:
        value, inner_done = pending.pop()
        children = _children(value)
        if children is None or id(value) in sizes:
            if problem := _leaf_problem(value):
                return problem
        elif inner_done:
            inner = [sizes.get(id(child), (1, 0)) for child in children]
            count, depth = 1 + sum(size for size, _ in inner), 1 + max((levels for _, levels in inner), default=0)
            if count > MOST_VALUES or depth > MOST_DEPTH:
                return f"it stands for more than {MOST_VALUES} values, or has more than {MOST_DEPTH} nested levels"
            sizes[id(value)] = count, depth
        elif id(value) in entered:
            return "an object contains itself"
        else:
            entered.add(id(value))
            pending.append((value, True))
            pending += [(child, False) for child in children]
    return ""


def _children(value: Any) -> list[Any] | None:
    """Return the objects in a container, ``None`` for other objects."""
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    return list(getattr(value, "args", ())) if isinstance(value, InertObject) else None


def _leaf_problem(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        return f"it holds a number of {value.bit_length()} bits"
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        return ""
    needed, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    return f"a tensor of {needed} bytes has {held} bytes in the file" if needed > held else ""


def _unpickling_refusal(path: Path, message: str) -> CheckpointError:
    needed = re.search(r"GLOBAL (\S+)", message)
    if needed:
        return CheckpointError(
            f"{path} needs {needed[1]} to be read. cogflow builds only tensors and plain values, since a pickle can "
            "run any code.",
            'If you trust the file, save its weights alone: torch.save({"module": model.state_dict()}, path).',
        )
    return CheckpointError(
        f"{path} is no checkpoint that can be read safely: {message.splitlines()[0][:200]}", _SAVE_AGAIN
    )


def _is_zip_format(path: Path) -> bool:
    """Return whether the file has torch's zip format, which can be mapped. Raises :class:`CheckpointError` for other
    files."""
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder, not a file.")
        with open_regular(path) as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}", "Check the path.") from error
    except DataError as error:
        raise CheckpointError(error.message, error.hint) from error
    if size == 0:
        raise CheckpointError(f"{path} is empty.", _SAVE_AGAIN)
    if start.startswith(b"PK\x03\x04"):
        _check_archive(path, size)
        return True
    if start.startswith(LEGACY_START):
        return False
    raise CheckpointError(
        f"{path} is no torch file: {describe_first_bytes(start)}",
        "Expected: a file that torch.save wrote (.pt, .bin or .ckpt).",
    )


def _check_archive(path: Path, size: int) -> None:
    """Check that a zip archive holds ``<name>/data.pkl`` and uncompressed entries that end inside the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated: the table of contents at its end is missing.", _SAVE_AGAIN
        ) from error
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"{path} is a TorchScript program, not weights.", "Save the model's state_dict().")
    if not any(re.fullmatch(r"[^/]+/data\.pkl", name) for name in names):
        raise CheckpointError(
            f"{path} is a zip archive that torch did not write. It holds {', '.join(names[:3]) or 'nothing'}.",
            "Unpack it first.",
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path} was unpacked and packed again with compression; torch's files are not compressed.", _SAVE_AGAIN
        )
    if any(entry.filename.endswith(".pkl") and entry.file_size > MOST_PICKLE_BYTES for entry in entries):
        raise CheckpointError(f"{path} describes its tensors in more than {MOST_PICKLE_BYTES} bytes.", _SAVE_AGAIN)
    if any(entry.header_offset + entry.file_size > size for entry in entries):
        raise CheckpointError(f"{path} is truncated.", _SAVE_AGAIN)


def is_torch_file(path: Path) -> bool:
    """Return whether a file begins as ``torch.save`` writes it: as a zip archive, or in the format before torch 1.6."""
    with open_regular(path) as file:
        start = file.read(64)
    return start.startswith((b"PK\x03\x04", LEGACY_START))


def describe_first_bytes(start: bytes) -> str:
    """Return what kind of file begins with the bytes ``start``, for error messages."""
    text = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer; the file itself was not downloaded (git lfs pull)."
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, probably from a failed download."
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        return "it looks like safetensors."
    for magic, program in ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"7z", "7-zip"), (b"Rar!", "rar")):
        if start.startswith(magic):
            return f"it is compressed with {program}; unpack it first."
    if start.startswith(b"GGUF"):
        return "it is GGUF."
    if start.startswith(b"\x80"):
        return "it is a pickle that torch did not write."
    if text.startswith((b"{", b"[")):
        return "it looks like JSON."
    return f"it begins with {start[:16]!r}."
