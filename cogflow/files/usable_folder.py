"""Find out before any work that a folder cannot be made or written, and name the disk's errors after it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cogflow import rank_identity
from cogflow.errors import CogflowError, StorageError
from cogflow.files.atomic_write import DISK_TEXT, FULL, REFUSED

MIN_FREE = 1 << 15
"""Bytes that a stage writes at the least: its record, the report and the logs."""
MARGIN = 40
"""Bytes that the hidden name of a folder that is being written is longer than its final name."""


def require_usable(folder: Path, subfolders: Iterable[str] = (), *, keys: str = "run.root, run.name") -> None:
    """Raise :class:`StorageError` when ``folder`` cannot be made or written. Nothing is written.

    ``subfolders``: names of folders that are made inside it. Where they exist, they must be folders that can be
    written. ``keys``: settings that choose the folder, for the message.
    """
    path = Path(os.path.abspath(folder.expanduser()))  # noqa: PTH100 - Path.resolve() follows links
    existing = _existing_part(path)
    _require_short_names(path, existing)
    _require_writable(path, existing, keys)
    if existing == path:
        for name in subfolders:
            if os.path.lexists(path / name):
                _require_writable(path / name, _existing_part(path / name), keys)
    _require_free_space(path, existing, keys)


@contextlib.contextmanager
def explain_disk_errors(folders: Sequence[Path]) -> Iterator[None]:
    """Turn a full disk, and a refused write below one of ``folders``, into a :class:`StorageError`."""
    try:
        yield
    except CogflowError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise _disk_full(folders, str(error)) from error
        names = [Path(os.fsdecode(name)).absolute() for name in (error.filename, error.filename2) if _is_path(name)]
        below = any(name.is_relative_to(folder.absolute()) for name in names for folder in folders)
        if error.errno in REFUSED and below:
            raise _of_this_rank(
                f"{names[-1]} cannot be written: {error}", "Move away what is in its place, or choose another folder."
            ) from error
        raise
    except Exception as error:
        if DISK_TEXT.search(str(error)):
            raise _disk_full(folders, str(error).splitlines()[0]) from error
        raise


def _is_path(name: object) -> bool:
    return isinstance(name, str | bytes)


def _disk_full(folders: Sequence[Path], reason: str) -> StorageError:
    places = [*folders, Path(tempfile.gettempdir())]
    free = {str(place): _free_bytes(_existing_part(place.absolute())) for place in places}
    shown = ", ".join(f"{size / 1e9:.2f} GB in {place}" for place, size in free.items() if size is not None)
    return _of_this_rank(
        f"A file cannot be written: {reason} (free: {shown}).",
        "Free space, raise the quota or the limit on file size, or choose another folder.",
    )


def _of_this_rank(message: str, hint: str) -> StorageError:
    """Return an error that this rank reports, because others may not have it."""
    error = StorageError(message, hint)
    error.rank = rank_identity.rank()
    return error


def _existing_part(path: Path) -> Path:
    """Return ``path`` or its nearest parent that exists. Raises :class:`StorageError` for a link to nothing."""
    for part in (path, *path.parents):
        try:
            part.stat()
            return part
        except (FileNotFoundError, NotADirectoryError):
            if part.is_symlink():
                raise StorageError(
                    f"{path} cannot be used: {part} is a link to {part.readlink()}, which does not exist.",
                    "Make the folder that the link names, or remove the link.",
                ) from None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                continue  # reported with its length
            raise StorageError(
                f"{path} cannot be used: {error}", "Choose a folder that you may read and write."
            ) from error
    return Path(path.anchor)


def _require_short_names(path: Path, existing: Path) -> None:
    try:
        longest, whole = os.pathconf(existing, "PC_NAME_MAX"), os.pathconf(existing, "PC_PATH_MAX")
    except OSError:
        return
    for part in path.relative_to(existing).parts:
        if (size := len(os.fsencode(part))) > longest - MARGIN:
            raise StorageError(
                f"{path} cannot be made: the name {part[:40]}... has {size} bytes.",
                f"Choose a name of at most {longest - MARGIN} bytes.",
            )
    if (size := len(os.fsencode(path))) > whole - longest - MARGIN:
        raise StorageError(
            f"{path} cannot be used: its path has {size} bytes.",
            f"Choose a path of at most {whole - longest - MARGIN} bytes.",
        )


def _require_writable(path: Path, existing: Path, keys: str) -> None:
    if not stat.S_ISDIR(existing.stat().st_mode):
        raise StorageError(
            f"{path} cannot be made: {existing} is a file, and a folder is needed there.",
            f"Move the file away, or choose another folder ({keys}).",
        )
    if os.access(existing, os.W_OK | os.X_OK):
        return
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        reason = "its file system is mounted read-only"
    else:
        reason = f"you ({_user()}) may not write there"
    raise StorageError(
        f"{existing} cannot be written: {reason}.",
        f"Choose a folder that you may write ({keys}), or change its permissions.",
    )


def _require_free_space(path: Path, existing: Path, keys: str) -> None:
    free = _free_bytes(existing)
    if free is not None and free < MIN_FREE:
        raise StorageError(
            f"{path} cannot be written: {free / 1e6:.2f} MB are free in {existing}.",
            f"Free space, or choose a folder on another disk ({keys}).",
        )
    found = os.statvfs(existing)
    if found.f_files and not found.f_favail:
        raise StorageError(
            f"{path} cannot be written: the file system of {existing} takes no more files (no inode is free).",
            f"Remove files, or choose a folder on another disk ({keys}).",
        )


def _free_bytes(folder: Path) -> int | None:
    """Return the free bytes of the file system of ``folder``; None where it does not tell."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for this user
        return str(os.getuid())
