"""What a published folder holds, file by file: ``{"files": {relative path: {"sha256", "bytes"}}}`` in ``manifest.json``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cogflow.files.uncached_io import read_uncached

MANIFEST = "manifest.json"
CHUNK = 1 << 22
THREADS = 8


def hash_uncached(path: Path) -> str:
    """sha256 of a file's bytes as the disk holds them, in hex, for a file that was flushed and let go: its pages are not kept."""
    digest = hashlib.sha256()
    for piece in read_uncached(path):
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
        for name in files_below(folder)
        if name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")


def hash_files(paths: Sequence[Path], read: Callable[[Path], str] = hash_file) -> list[str]:
    """sha256 of several files, read side by side: one core hashes about 1.5 GB a second, a disk of a cluster gives more."""
    with ThreadPoolExecutor(max(1, min(THREADS, len(paths)))) as pool:
        return list(pool.map(read, paths))


def share_of(sizes: Mapping[str, int], part: int, of: int) -> list[str]:
    """The names that the ``part``-th of ``of`` readers takes, so that all have about as many bytes; together they take all."""
    loads, mine = [0] * of, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        place = loads.index(min(loads))
        loads[place] += sizes[name]
        if place == part:
            mine.append(name)
    return mine


def check_manifest(folder: Path, part: int = 0, of: int = 1) -> list[str]:
    """What differs from the manifest, one line per file; empty when all is as it was published.

    Sizes are compared first, so that a truncated file is found without reading it. A missing or unreadable manifest is a
    problem, too. Of ``of`` readers the ``part``-th hashes its share of the files only; what costs no reading, all of them look at.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in entries.items()}
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST}: unreadable ({error})"]
    present = set(files_below(folder)) - {MANIFEST}
    problems = [f"{name}: missing" for name in sorted(expected.keys() - present)]
    problems += [f"{name}: not in the manifest" for name in sorted(present - expected.keys())]
    to_hash: list[str] = []
    mine = set(share_of({name: size for name, (_, size) in expected.items()}, part, of))
    for name in sorted(expected.keys() & present):
        size, path = expected[name][1], folder / name
        if path.is_symlink():
            problems.append(f"{name}: a symbolic link in the place of a file")
        elif (found := path.stat().st_size) != size:
            problems.append(f"{name}: {found} bytes, {size} expected")
        elif name in mine:
            to_hash.append(name)
    hashes = hash_files([folder / name for name in to_hash])
    problems += [
        f"{name}: content changed (sha256 differs)"
        for name, sha256 in zip(to_hash, hashes, strict=True)
        if sha256 != expected[name][0]
    ]
    return problems


def files_below(folder: Path) -> list[str]:
    """Relative paths of all files below ``folder``, with forward slashes, sorted. Links to folders count as files."""
    names = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        names += [Path(root, name).relative_to(folder).as_posix() for name in [*files, *links]]
    return sorted(names)
