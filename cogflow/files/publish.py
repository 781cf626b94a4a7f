"""Publish files and folders atomically: a reader sees the old artefact or the new one whole, never a part.

Everything is written beside its target under a hidden name, synced to the disk and then renamed. A kill at any point leaves
at most a hidden leftover, which the next publisher of the same target sweeps away once its writer is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cogflow.errors import CogflowError, StorageError
from cogflow.files.manifest import write_manifest

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}
DISK_TEXT = re.compile(
    r"No space left on device|File too large|os error (27|28|122)\b|Disk quota exceeded|"
    r"PytorchStreamWriter failed|unexpected pos \d+ vs \d+|iostream error"
)
"""What safetensors and torch make of a full disk."""
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|old)-(?P<pid>\d+)$")


def write_first(path: Path, text: str) -> None:
    """Write ``text`` into a file that is not there yet: of several processes the first one's word stands. Never raises."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        print(f"{path} cannot be written: {error}", file=sys.stderr)


@contextlib.contextmanager
def publish_folder(target: Path, *, replace: bool = False, known: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Yield a hidden folder beside ``target`` to write into; when the block ends well it becomes ``target``.

    The folder gets a ``manifest.json`` (see :mod:`cogflow.files.manifest`). When the block raises, nothing is visible and an
    existing ``target`` is untouched. With ``replace`` an existing ``target`` is moved aside only once the new folder is
    whole and synced, and removed after the new one is in place.

    ``known``: sha256 by relative path of large files that the block hashed while it wrote them; it may fill it as it goes.

    One process publishes a target at a time; in a group of ranks that is the caller's business.

    Raises :class:`StorageError` when ``target`` exists and may not be replaced, or when the disk refuses.
    """
    target = Path(target)
    if os.path.lexists(target) and not replace:
        raise StorageError(f"{target} exists already.", "Choose another folder, or remove this one.")
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    try:
        with storage_errors(target):
            yield partial
            write_manifest(partial, known)
            sync_tree(partial)
            _swap(partial, target)
    except BaseException:
        _remove(partial)
        raise


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` holds the old content or all of the new. Raises :class:`StorageError`."""
    path = Path(path)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path)
            with open(partial, "w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, written as :func:`write_text` does. NaN and infinity become null: JSON has neither."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append(path: Path, text: str) -> None:
    """Add ``text`` to a log. Never raises: a log that cannot be written must not hide what it was about to say."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        print(f"{path} cannot be written: {error}", file=sys.stderr)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk and a refused write into a :class:`StorageError` that names ``path`` and the free space.

    Full disks also arrive as other exceptions (safetensors and torch wrap them), so their text is looked at, too.
    """
    try:
        yield
    except CogflowError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise _full(path, str(error.strerror)) from error
        if error.errno in REFUSED and _concerns(path, error.filename):
            raise StorageError(
                f"{path} cannot be written: {error}", "Choose a place where you may make files and folders."
            ) from error
        raise
    except Exception as error:
        if DISK_TEXT.search(str(error)):
            raise _full(path, str(error).splitlines()[0]) from error
        raise


def require_space(path: Path, needed: int) -> None:
    """Raise :class:`StorageError` when the disk of ``path`` has less than ``needed`` bytes free. ``path`` need not exist."""
    folder = _existing_parent(path)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{path} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {folder}.",
            "Free space or choose another folder.",
        )


def sweep(target: Path) -> None:
    """Remove what writers of ``target`` that were killed left beside it; put back an old folder that was being replaced."""
    for entry in list(target.parent.iterdir()):
        match = LEFTOVER.match(entry.name)
        if not match or match["name"] != target.name or _alive(int(match["pid"])):
            continue
        if match["kind"] == "old" and not os.path.lexists(target):
            os.rename(entry, target)
        else:
            _remove(entry)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
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
    """fsync every file and folder below ``folder``, and itself."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(root, name)
            if not path.is_symlink():
                sync(path)
        sync(Path(root))


def _swap(partial: Path, target: Path) -> None:
    """Put ``partial`` in the place of ``target``, which may exist."""
    if not os.path.lexists(target):
        os.rename(partial, target)
        sync(target.parent)
        return
    if _exchange(partial, target):
        sync(target.parent)
        _remove(partial)
        return
    # No exchange on this file system: a kill between the two renames hides the old folder until sweep() brings it back.
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(old, target)
        raise
    sync(target.parent)
    _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux's ``renameat2``); False where kernel, C library or file system cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in Path(path).expanduser().absolute().parents if parent.is_dir())


def _concerns(path: Path, filename: object) -> bool:
    """Whether a refused file is part of writing ``path``, not something else that was read meanwhile."""
    if not isinstance(filename, str | bytes):
        return filename is None
    refused = Path(os.fsdecode(filename)).absolute()
    return refused.is_relative_to(Path(path).absolute().parent) or Path(path).absolute().is_relative_to(refused)


def _full(path: Path, reason: str) -> StorageError:
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
