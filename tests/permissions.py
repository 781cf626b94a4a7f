"""Compare the permissions of files with the umask."""

from __future__ import annotations

import os
from pathlib import Path


def current_umask() -> int:
    """Return the umask of this process."""
    found = os.umask(0)
    os.umask(found)
    return found


def wrong_permissions(folder: Path, umask: int) -> list[str]:
    """Return the paths below ``folder`` whose permissions to read and write do not follow ``umask``.

    Links to files of another folder and W&B's own files are left out. DeepSpeed makes its scripts executable.
    """
    found = []
    for path in folder.rglob("*"):
        known = path.lstat()
        linked = path.is_symlink() or (path.is_file() and known.st_nlink > 1)
        if not linked and not path.is_relative_to(folder / "wandb") and known.st_mode & 0o666 != 0o666 & ~umask:
            found.append(f"{known.st_mode & 0o777:o} {path.relative_to(folder)}")
    return found
