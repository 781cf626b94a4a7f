"""Find the artifacts of a run in ``events.jsonl``, and the files that belong to one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from cogflow.records.event_records import ArtifactEvent, Event

OUTSIDE = ""
"""Stage of an artifact that no stage of the run made, such as the base model."""


def newest_artifacts(events: Iterable[Event]) -> dict[str, ArtifactEvent]:
    """Return the newest artifact of each name."""
    return {event.name: event for event in events if isinstance(event, ArtifactEvent)}


def artifact_files(files: Path | Iterable[Path]) -> dict[str, Path]:
    """Return the files by their name inside the artifact. Hidden files are partial writes and are left out."""
    if not isinstance(files, Path):
        return {path.name: path for path in map(Path, files)}
    if files.is_file():
        return {files.name: files}
    inside = {path.relative_to(files).as_posix(): path for path in sorted(files.rglob("*")) if path.is_file()}
    return {name: path for name, path in inside.items() if not any(part.startswith(".") for part in name.split("/"))}


def recorded_files(folder: Path, event: ArtifactEvent) -> dict[str, Path]:
    """Return the files of a recorded artifact of the run in ``folder`` by their name; none when they are gone."""
    if event.paths is not None:
        found = [folder / path for path in event.paths]
        return artifact_files(found) if all(path.is_file() for path in found) else {}
    return artifact_files(folder / event.path) if event.path is not None else {}


def artifact_at(folder: Path, artifacts: Mapping[str, ArtifactEvent], path: Path) -> ArtifactEvent | None:
    """Return the artifact that a stage of the run in ``folder`` made and that contains ``path``, or None.

    An artifact of single files, such as a checkpoint's record, stands for the folder of these files below the run's.
    """
    real, run = path.resolve(), folder.resolve()
    found: dict[int, ArtifactEvent] = {}  # by the length of the folder's path: the deepest one counts
    for event in artifacts.values():
        if event.stage == OUTSIDE:
            continue
        roots = [event.path] if event.path is not None else [str(Path(one).parent) for one in event.paths or []]
        for root in [(folder / root).resolve() for root in roots]:
            if root != run and real.is_relative_to(root):
                found[len(root.parts)] = event
    return found[max(found)] if found else None
