"""Lines of ``events.jsonl``: what a run logged besides scalars, one JSON object a line with its ``kind``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeAlias

from cogflow.files.record_io import OMIT_NONE, Record

Cell: TypeAlias = str | int | float | bool | None
"""A cell of a table. Videos and pictures are paths relative to the run folder."""


@dataclass(frozen=True)
class MediaEvent(Record):
    """A video or an image logged under ``key`` at ``step``. ``path``: relative to the run folder if inside."""

    kinds: ClassVar[tuple[str, ...]] = ("video", "image")

    kind: str
    step: int
    key: str
    path: str
    caption: Annotated[str | None, OMIT_NONE] = None
    stage: str = ""
    time: float = 0.0


@dataclass(frozen=True)
class TableEvent(Record):
    """A table. The newest one under a key is the one that the report shows."""

    kinds: ClassVar[tuple[str, ...]] = ("table",)

    key: str
    columns: list[str]
    rows: list[list[Cell]]
    kind: str = "table"
    stage: str = ""
    time: float = 0.0


@dataclass(frozen=True)
class AlertEvent(Record):
    """A warning for the user. ``level``: INFO, WARN or ERROR. ``picture``: path of an image of what is meant."""

    kinds: ClassVar[tuple[str, ...]] = ("alert",)

    title: str
    text: str
    level: str = "WARN"
    picture: Annotated[str | None, OMIT_NONE] = None
    kind: str = "alert"
    stage: str = ""
    time: float = 0.0


@dataclass(frozen=True)
class ArtifactEvent(Record):
    """A product of a stage: number and size of its files, and the artifacts that it was made from (``uses``).

    ``path``: the folder or file; ``paths``: the files of an artifact that is no whole folder. Both are relative to the
    run folder if inside. ``stage``: empty for an input that no stage of the run made.
    """

    kinds: ClassVar[tuple[str, ...]] = ("artifact",)

    name: str
    type: str
    files: int
    bytes: int
    uses: list[str]
    path: Annotated[str | None, OMIT_NONE] = None
    paths: Annotated[list[str] | None, OMIT_NONE] = None
    manifest_sha256: Annotated[str | None, OMIT_NONE] = None
    kind: str = "artifact"
    stage: str = ""
    time: float = 0.0


Event: TypeAlias = MediaEvent | TableEvent | AlertEvent | ArtifactEvent

EVENT_KINDS: dict[str, type[MediaEvent] | type[TableEvent] | type[AlertEvent] | type[ArtifactEvent]] = {
    name: kind for kind in (MediaEvent, TableEvent, AlertEvent, ArtifactEvent) for name in kind.kinds
}
"""The record class of each ``kind``."""
