"""What a published folder holds, file by file: ``{"files": {relative path: {"sha256", "bytes"}}}`` in ``manifest.json``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from cogflow.files.passing import read_passing

MANIFEST = "manifest.json"
CHUNK = 1 << 22


def hash_passing(path: Path) -> str:
    """sha256 of a file's bytes as the disk holds them, in hex, for a file that was flushed and let go: its pages are not kept."""
    digest = hashlib.sha256()
    for piece in read_passing(path):
        digest.update(piece)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Hash every file below ``folder`` into ``folder/manifest.json``; ``known``: sha256 by relative path of those hashed already."""
    known = known or {}
    entries = {
        name: {"sha256": known.get(name) or hash_file(folder / name), "bytes": (folder / name).stat().st_size}
        for name in _files(folder)
        if name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")


def check_manifest(folder: Path) -> list[str]:
    """What differs from the manifest, one line per file; empty when all is as it was published.

    Sizes are compared first, so that a truncated file is found without reading it. A missing or unreadable manifest is a
    problem, too.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in entries.items()}
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST}: unreadable ({error})"]
    present = set(_files(folder)) - {MANIFEST}
    problems = [f"{name}: missing" for name in sorted(expected.keys() - present)]
    problems += [f"{name}: not in the manifest" for name in sorted(present - expected.keys())]
    for name in sorted(expected.keys() & present):
        sha256, size = expected[name]
        path = folder / name
        if path.is_symlink():
            problems.append(f"{name}: a symbolic link in the place of a file")
        elif (found := path.stat().st_size) != size:
            problems.append(f"{name}: {found} bytes, {size} expected")
        elif hash_file(path) != sha256:
            problems.append(f"{name}: content changed (sha256 differs)")
    return problems


def _files(folder: Path) -> list[str]:
    """Relative paths of all files below ``folder``, with forward slashes, sorted. Links to folders count as files."""
    names = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        names += [Path(root, name).relative_to(folder).as_posix() for name in [*files, *links]]
    return sorted(names)
