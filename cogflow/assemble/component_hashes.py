"""Every file of a pipeline hashed once, in parallel, and held against what it was published with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from cogflow.assemble.components import KEPT, PipelineComponent
from cogflow.assemble.contradiction import Contradiction
from cogflow.files.hashing import Advance, hash_with_cache
from cogflow.files.manifest import MANIFEST

HEX = 64  # digits of a sha256


def hash_parts(
    parts: Mapping[str, PipelineComponent], advance: Advance | None = None, *, rehash: bool = False
) -> tuple[dict[Path, str], int]:
    """sha256 by path of every file of ``parts``, and how many bytes were known from before (:mod:`cogflow.files.hashing`)."""
    return hash_with_cache({path for part in parts.values() for path in part.files.values()}, advance, rehash=rehash)


def total_bytes(parts: Mapping[str, PipelineComponent]) -> int:
    return sum(path.stat().st_size for path in {path for part in parts.values() for path in part.files.values()})


def altered(part: PipelineComponent, hashes: Mapping[Path, str]) -> Iterator[Contradiction]:
    """Files that are not as ``part``'s folder was published: by the manifest of an export, a pipeline or a checkpoint, or by the names
    that Hugging Face's cache gives to large files, which are their sha256."""
    again = f"bring the published file back, or stage.{part.name}=FOLDER of another one"
    for root, entries in _manifests(part.folder):
        if entries is None:
            yield Contradiction(
                f"{part.name}.{MANIFEST}", "unreadable", str(root / MANIFEST), "it should be", "JSON", "cogflow", again
            )
            return
        inside = {root / name: entry for name, entry in entries.items() if (root / name).parent == part.folder}
        for path, entry in sorted(inside.items()):
            if path.name not in part.files and path.suffix in KEPT:
                yield Contradiction(
                    f"{part.name}.{path.name}",
                    "missing",
                    str(part.folder),
                    "it was published with",
                    entry,
                    str(root / MANIFEST),
                    again,
                )
        for name, path in sorted(part.files.items()):
            published = inside.get(part.folder / name)
            if published != hashes[path]:
                found = f"sha256 {hashes[path]}"
                needed = f"sha256 {published}" if published else "no such file"
                key = f"{part.name}.{name}"
                meant = f"; stage.force=[{key}] if it was changed on purpose" if name.endswith(".json") else ""
                yield Contradiction(
                    key, found, str(path), "it was published with", needed, str(root / MANIFEST), again + meant
                )
    for name, path in sorted(part.files.items()):
        if path.parent.name == "blobs" and len(path.name) == HEX and path.name != hashes[path]:
            needed = f"sha256 {path.name}"
            yield Contradiction(
                f"{part.name}.{name}",
                f"sha256 {hashes[path]}",
                str(path),
                "it was fetched as",
                needed,
                "its own name",
                again,
            )


def _manifests(folder: Path) -> Iterator[tuple[Path, dict[str, str] | None]]:
    """The nearest folder with a manifest that names files of ``folder``, and sha256 by relative name; ``None`` for one that is broken."""
    for root in (folder, folder.parent):
        try:
            entries = json.loads((root / MANIFEST).read_text(encoding="utf-8"))["files"]
            hashes = {str(name): str(entry["sha256"]) for name, entry in entries.items()}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            yield root, None
            return
        if any((root / name).parent == folder for name in hashes):
            yield root, hashes
            return
