"""Open, create and copy files below a folder by a name that came from a file, and read files of other people.

The records, indexes and manifests of a run or a pipeline may come from a stranger, and so may the names in them.
A name is opened one component at a time, each relative to the descriptor of the folder before it (``openat``) and
without following links. A folder that is exchanged for a link between two steps therefore changes nothing.
Only regular files are opened: a fifo, a device or a socket is refused at once and never waited for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from cogflow.errors import DataError, UserError, format_list

MOST_COMPONENTS = 32
"""Folders that a contained name may pass through."""
MOST_BYTES = 1 << 26
"""Bytes of a file that is read as a whole, unless its reader states another limit."""
PIECE = 1 << 20
"""Bytes copied at a time."""
MOST_LINKS = 20
"""Links of a folder that a message lists."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def name_parts(root: Path, name: str) -> tuple[str, ...]:
    """Return the components of a relative ``name`` below ``root``.

    Raises :class:`DataError` for an empty name, an absolute path, ``..``, control characters and backslashes.
    """
    hint = f"Names are relative to {root} and stay inside it."
    if not name.strip() or any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise DataError(f"{name!r} is not a file name.", hint)
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        raise DataError(f"{name} is an absolute path.", hint)
    parts = PurePosixPath(name).parts
    if ".." in parts or ".." in PureWindowsPath(name).parts:
        raise DataError(f"{name} leads out of its folder.", hint)
    if not parts or len(parts) > MOST_COMPONENTS:
        raise DataError(f"{name[:200]!r} is not a file name.", hint)
    return parts


def plain_name(root: Path, name: str) -> str:
    """Return ``name`` if it names an entry of ``root`` itself. Raises :class:`DataError` for any other name."""
    parts = name_parts(root, name)
    if len(parts) != 1 or len(PureWindowsPath(name).parts) != 1:
        raise DataError(f"{name} is not the name of a file in {root}.", f"Names are those of files in {root}.")
    return parts[0]


def open_below(root: Path, name: str) -> BinaryIO:
    """Open the regular file ``root/name`` for reading. ``root`` may be a link, nothing below it.

    Raises :class:`DataError` for a name that leads out (:func:`name_parts`), a link, a missing file, and anything that
    is no regular file.
    """
    parts = name_parts(root, name)
    with _folder_of(root, parts) as folder:
        try:
            # Opening a device can have effects, so the kind is asked for before, too.
            _require_regular(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode, Path(root, name))
            descriptor = os.open(parts[-1], _READ | os.O_NOFOLLOW, dir_fd=folder)
        except OSError as error:
            raise _refusal(root, parts, folder, error) from error
        return _regular(descriptor, Path(root, name))


def is_file_below(root: Path, name: str) -> bool:
    """Return whether :func:`open_below` opens ``root/name``."""
    try:
        open_below(root, name).close()
    except (DataError, OSError):
        return False
    return True


def read_below(root: Path, name: str, max_bytes: int = MOST_BYTES) -> bytes:
    """Return the bytes of ``root/name``, see :func:`open_below`. A larger file raises :class:`DataError`."""
    with open_below(root, name) as file:
        return _read_bounded(file, Path(root, name), max_bytes)


def create_below(root: Path, name: str) -> BinaryIO:
    """Create the file ``root/name`` and open it for writing. Missing folders are made.

    Raises :class:`DataError` for a name that leads out, a link on the way, and a name that is taken.
    """
    parts = name_parts(root, name)
    with _folder_of(root, parts, make=True) as folder:
        try:
            return os.fdopen(os.open(parts[-1], _CREATE, 0o666, dir_fd=folder), "wb")
        except OSError as error:
            raise _refusal(root, parts, folder, error) from error


def copy_below(source: Path, name: str, target: Path, new_name: str) -> int:
    """Copy the regular file ``source/name`` to the new file ``target/new_name`` and return its size in bytes.

    Raises :class:`DataError` as :func:`open_below` and :func:`create_below` do.
    """
    size = 0
    with open_below(source, name) as original, create_below(target, new_name) as copy:
        while piece := original.read(PIECE):
            size += copy.write(piece)
    return size


def open_regular(path: Path) -> BinaryIO:
    """Open a file that the user named. Links are followed, because the user chose them.

    Raises :class:`DataError` for a fifo, a device or a socket, and :class:`OSError` as ``open`` does.
    """
    _require_regular(Path(path).stat().st_mode, Path(path))
    return _regular(os.open(path, _READ), Path(path))


def read_regular(path: Path, max_bytes: int = MOST_BYTES) -> bytes:
    """Return the bytes of a file that the user named, see :func:`open_regular`.

    Raises :class:`DataError` for a file of more than ``max_bytes``.
    """
    with open_regular(path) as file:
        return _read_bounded(file, Path(path), max_bytes)


def create_file(path: Path) -> BinaryIO:
    """Create ``path``, which must not exist, not even as a link, and open it for writing. Raises :class:`OSError`.

    Other users of a shared folder can foresee the names of temporary files, and place links there.
    """
    return os.fdopen(os.open(path, _CREATE, 0o666), "wb")


def open_to_append(path: Path) -> BinaryIO:
    """Open a log to append to, unbuffered; it is created if it is missing. A link in its place is not followed.

    Raises :class:`OSError`, and :class:`DataError` for anything that is no regular file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "ab", buffering=0)


def refuse_links_out(
    folder: Path,
    shared: Collection[str] = (),
    logs: Collection[str] = (),
    error: type[UserError] = DataError,
) -> None:
    """Raise ``error`` when ``folder`` holds a link that leads out of it, a fifo, a device or a socket.

    Links inside of ``folder`` are allowed. An entry of ``folder`` whose name is in ``shared`` may also be a link to the
    entry of this name of a folder beside ``folder``. Links named ``*.log`` in the folders ``logs`` of ``folder`` are
    allowed, because nothing reads them. A missing folder is no error. Entries are listed, not opened.
    """
    root = Path(folder).resolve()
    problems: list[str] = []
    pending = [os.fspath(root)] if root.is_dir() else []
    while pending:
        try:
            entries = sorted(os.scandir(pending.pop()), key=lambda entry: entry.name)
        except OSError:
            continue  # an entry that vanished, or that its reader will report
        for entry in entries:
            if entry.is_symlink():
                target = Path(os.path.realpath(entry.path))
                is_shared = entry.name in shared and target.name == entry.name and target.parent.parent == root.parent
                top = Path(entry.path).relative_to(root).parts[0]
                is_log = top in logs and entry.name.endswith(".log")
                if not (target.is_relative_to(root) or is_log or (is_shared and Path(entry.path).parent == root)):
                    problems.append(f"{entry.path} is a link to {target}")
            elif entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            elif not entry.is_file(follow_symlinks=False):
                problems.append(f"{entry.path} is no regular file")
    if problems:
        raise error(
            f"{folder} is not used, because entries of it lead out of it or are no files:\n"
            f"{format_list(problems, MOST_LINKS)}",
            "Replace each link by what it leads to, or remove it. To keep results on another disk, set run.root.",
        )


@contextlib.contextmanager
def _folder_of(root: Path, parts: tuple[str, ...], *, make: bool = False) -> Iterator[int]:
    """Yield the descriptor of the folder that holds the last of ``parts``."""
    try:
        folder = os.open(root, _FOLDER)
    except OSError as error:
        raise DataError(f"{root} cannot be opened: {error.strerror}.") from error
    try:
        for number, part in enumerate(parts[:-1], start=1):
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=folder)
            try:
                inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
            except OSError as error:
                raise _refusal(root, parts[:number], folder, error) from error
            os.close(folder)
            folder = inner
        yield folder
    finally:
        os.close(folder)


def _refusal(root: Path, parts: tuple[str, ...], folder: int, error: OSError) -> DataError:
    """Return the error for the last of ``parts``, which could not be opened in the descriptor ``folder``."""
    place = Path(root, *parts)
    hint = f"Files of {root} are regular files inside it."
    if error.errno == errno.ENOENT:
        return DataError(f"{place} is missing.", hint)
    if error.errno == errno.EEXIST:
        return DataError(f"{place} exists already.", hint)
    with contextlib.suppress(OSError):
        if stat.S_ISLNK(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode):
            return DataError(f"{place} is a symbolic link, which is not followed.", hint)
    return DataError(f"{place} cannot be opened: {error.strerror}.", hint)


def _regular(descriptor: int, path: Path) -> BinaryIO:
    """Return the open file of ``descriptor``, which is closed when it is no regular file."""
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _require_regular(mode: int, path: Path) -> None:
    """Raise for the ``mode`` of anything but a regular file: ``OSError`` for links and folders, else DataError."""
    if stat.S_ISREG(mode):
        return
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise DataError(f"{path} is no regular file but {_kind(mode)}.", "Give a regular file.")


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a fifo"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _read_bounded(file: BinaryIO, path: Path, max_bytes: int) -> bytes:
    content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DataError(
            f"{path} has {max(os.fstat(file.fileno()).st_size, len(content))} bytes; at most {max_bytes} are read."
        )
    return content
