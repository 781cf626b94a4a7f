"""Keep names from outside inside their folder, and name the folder of a run."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

from cogflow.errors import DataError


class Run(Protocol):
    """The fields of ``RunConfig`` that this module needs; this package does not import the config."""

    @property
    def root(self) -> str: ...

    @property
    def name(self) -> str: ...


def contained(root: Path, name: str) -> Path:
    """Return ``root / name`` if it stays inside ``root`` when symbolic links are followed.

    The file need not exist. Raises :class:`DataError` for an empty name, an absolute path, ``..`` and links that
    lead out.
    """
    hint = f"Names are relative to {root} and stay inside it."
    if not name.strip() or "\0" in name:
        raise DataError(f"{name!r} is not a file name.", hint)
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        raise DataError(f"{name} is an absolute path.", hint)
    if ".." in PurePosixPath(name).parts or ".." in PureWindowsPath(name).parts:
        raise DataError(f"{name} leads out of its folder.", hint)
    path = Path(root) / name
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} cannot be followed: {error}", hint) from error
    if not resolved.is_relative_to(Path(root).resolve()):
        raise DataError(f"{name} is a link to {resolved}, outside of {root}.", hint)
    return path


def run_folder(run: Run) -> Path:
    """Return ``<run.root>/<run.name>`` with ``~`` expanded. The folder is not created."""
    return Path(run.root).expanduser() / run.name
