"""Open a ``.pt`` file with torch's restricted reader: tensors and plain values, nothing that could run code.

What a training program pickles beside its weights (numpy's random states, DeepSpeed's loss scaler) is named here one by one and
read as an :class:`Inert` object: neither numpy's nor DeepSpeed's own code runs. A file that asks for any other class or function is
refused, and not tried again in another way.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from cogflow.errors import CheckpointError

RANDOM_STATES = (
    "numpy.core.multiarray._reconstruct",  # numpy 1
    "numpy._core.multiarray._reconstruct",  # numpy 2
    "numpy.ndarray",
    "numpy.dtype",
)
"""What the tuple of ``numpy.random.get_state()`` is pickled with; SAT keeps it as np_rng_state."""

LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""torch's magic number, pickled: how files from before torch 1.6 begin."""

_AGAIN = "Copy or download it again, whole."


_DAMAGE = (
    OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ImportError, AssertionError, ArithmeticError,
    struct.error,
)  # fmt: skip
"""What torch's reader raises for bytes that are not as they were written: changed files were tried by the hundred."""


class Inert:
    """Stands in for an object that is not built. ``args``: what its constructor would have been called with."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        """The state is left out."""


def load(path: Path, inert: Iterable[str] = RANDOM_STATES) -> Any:
    """What a ``.pt`` file holds, its tensors mapped from the file and on the CPU (files from before torch 1.6 cannot be mapped).

    ``inert``: full names of the classes and functions that are read as :class:`Inert`. Raises :class:`CheckpointError` for files
    that are missing, empty, truncated or of another kind, and for those that need other classes or functions.
    """
    path = Path(path)
    mapped = _check(path)
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in inert]):
            return torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
    except UnpicklingError as error:
        raise _refused(path, str(error)) from error
    except MemoryError as error:
        raise CheckpointError(
            f"{path} does not fit into memory.", "Save it again with torch 1.6 or newer: such files are mapped."
        ) from error
    except _DAMAGE as error:
        # torch says little, at length, of what is wrong with a file
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}", _AGAIN) from error


def _refused(path: Path, message: str) -> CheckpointError:
    needs = re.search(r"GLOBAL (\S+)", message)
    if needs:
        return CheckpointError(
            f"{path} needs {needs[1]} to be read. cogflow builds tensors and plain values only, since a pickle can run any code.",
            'Where you trust the file, save its weights alone: torch.save({"module": model.state_dict()}, path).',
        )
    return CheckpointError(f"{path} is no checkpoint that can be read safely: {message.splitlines()[0][:200]}", _AGAIN)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _check(path: Path) -> bool:
    """Whether the file is of torch's present format, which can be mapped; :class:`CheckpointError` for anything that is no torch file."""
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder, not a file.")
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}", "Is the path right?") from error
    if size == 0:
        raise CheckpointError(f"{path} is empty.", _AGAIN)
    if start.startswith(b"PK\x03\x04"):
        _check_archive(path, size)
        return True
    if start.startswith(LEGACY):
        return False
    raise CheckpointError(
        f"{path} is no torch file: {looks_like(start)}", "Expected is what torch.save writes: .pt, .bin or .ckpt."
    )


def _check_archive(path: Path, size: int) -> None:
    """A torch file is a zip archive of ``<name>/data.pkl`` and uncompressed ``<name>/data/<number>``; Python's zipfile knows no less."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated: its table of contents, which comes last, is missing.", _AGAIN
        ) from error
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"{path} is a TorchScript program, not weights.", "Save the model's state_dict().")
    if not any(re.fullmatch(r"[^/]+/data\.pkl", name) for name in names):
        raise CheckpointError(
            f"{path} is a zip archive, but not one that torch wrote. It holds {', '.join(names[:3]) or 'nothing'}.",
            "Unpack it first?",
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} was unpacked and packed again, compressed; torch's files are not.", _AGAIN)
    if any(entry.header_offset + entry.file_size > size for entry in entries):
        raise CheckpointError(f"{path} is truncated.", _AGAIN)


def looks_like(start: bytes) -> str:
    """A few words on a file that begins with ``start``."""
    text = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, the file itself was not downloaded (git lfs pull)."
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, as a failed download leaves."
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        return "it looks like safetensors."
    for magic, what in ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"7z", "7-zip"), (b"Rar!", "rar")):
        if start.startswith(magic):
            return f"it is compressed with {what}; unpack it first."
    if start.startswith(b"GGUF"):
        return "it is GGUF."
    if start.startswith(b"\x80"):
        return "it is a pickle, but not of torch."
    if text.startswith((b"{", b"[")):
        return "it looks like JSON."
    return f"it begins with {start[:16]!r}."
