"""Write a file in one step: readers see the old content or all of the new. Name path and space in the disk's errors."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogflow.errors import CogflowError, DataError, StorageError
from cogflow.files.contained_files import create_file, open_to_append
from cogflow.files.printable import one_line

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}
DISK_TEXT = re.compile(
    r"No space left on device|File too large|os error (27|28|122)\b|Disk quota exceeded|"
    r"PytorchStreamWriter failed|unexpected pos \d+ vs \d+|iostream error"
)
"""Messages of safetensors and torch when the disk is full."""
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|old)-(?P<pid>\d+)$")
"""Name of a file or folder that is being written (partial) or replaced (old) by the process ``pid``."""


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` in one step. Raises :class:`StorageError`."""
    path = Path(path)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path)
            with create_file(partial) as file:
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON in one step. NaN and infinity become null, because JSON has neither.

    Raises :class:`StorageError`.
    """
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_first(path: Path, text: str) -> None:
    """Write ``text`` to a file that does not exist yet; of several processes the first one succeeds. Never raises."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        print(one_line(f"{path} cannot be written: {error}"), file=sys.stderr)


def append_text(path: Path, text: str) -> None:
    """Append ``text`` to a log. Never raises: an error here must not hide the error that is being logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_to_append(path) as file:
            file.write(text.encode("utf-8", "replace"))
    except (OSError, DataError) as error:
        print(one_line(f"{path} cannot be written: {error}"), file=sys.stderr)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk and a refused write into a :class:`StorageError` that names ``path`` and the free space.

    safetensors and torch raise other exceptions for a full disk, so the text of an exception is searched, too.
    """
    try:
        yield
    except CogflowError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise _disk_full(path, str(error.strerror)) from error
        if error.errno in REFUSED and _concerns(path, error.filename):
            raise StorageError(
                f"{path} cannot be written: {error}", "Choose a place where you may make files and folders."
            ) from error
        raise
    except Exception as error:
        if DISK_TEXT.search(str(error)):
            raise _disk_full(path, str(error).splitlines()[0]) from error
        raise


def require_space(path: Path, needed: int) -> None:
    """Raise :class:`StorageError` when the disk of ``path`` has less than ``needed`` bytes free.

    ``path`` need not exist.
    """
    folder = _existing_parent(path)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{path} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {folder}.",
            "Free space or choose another folder.",
        )


def remove_leftovers(target: Path) -> None:
    """Remove what killed writers of ``target`` left beside it, and restore an old folder that was being replaced."""
    for entry in list(target.parent.iterdir()):
        match = LEFTOVER.match(entry.name)
        if not match or match["name"] != target.name or _alive(int(match["pid"])):
            continue
        if match["kind"] == "old" and not os.path.lexists(target):
            entry.rename(target)
        else:
            remove(entry)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it. A missing one is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync folders; the rename is still atomic there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below ``folder``, and the folder itself."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(root, name)
            if not path.is_symlink():
                sync(path)
        sync(Path(root))


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in Path(path).expanduser().absolute().parents if parent.is_dir())


def _concerns(path: Path, filename: object) -> bool:
    """True when a refused file belongs to writing ``path``, not to something else that was read meanwhile."""
    if not isinstance(filename, str | bytes):
        return filename is None
    refused = Path(os.fsdecode(filename)).absolute()
    return refused.is_relative_to(Path(path).absolute().parent) or Path(path).absolute().is_relative_to(refused)


def _disk_full(path: Path, reason: str) -> StorageError:
    folder = _existing_parent(path)
    free = shutil.disk_usage(folder).free / 1e9
    return StorageError(
        f"{path} cannot be written: {reason} ({free:.2f} GB free in {folder}).",
        "Free space, or raise the limit on file size; what was there before is untouched.",
    )


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value
