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
    """Return the paths below ``folder`` whose permissions do not follow ``umask``. W&B's own files are left out."""
    found = []
    for path in folder.rglob("*"):
        if path.is_symlink() or path.is_relative_to(folder / "wandb"):
            continue
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        if (mode := path.stat().st_mode & 0o777) != expected:
            found.append(f"{mode:o} {path.relative_to(folder)}")
    return found
