"""``cache/index.json``: the prepared clips of a run; and what is stored with each clip's tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from cogflow.errors import DataError, UserError
from cogflow.files.record_io import OMIT_NONE, Measured, RawRecord, Record
from cogflow.records.sample_records import ClipMetrics

OMIT_EMPTY = Field(exclude_if=lambda value: not value)


@dataclass(frozen=True)
class SoftGroup:
    """The softer of two groups of clips.

    ``gap``: difference of their detail; ``distance``: in deviations of a group.
    """

    soft: list[str]
    gap: float
    distance: float
    line: str


@dataclass(frozen=True)
class LoaderChanges:
    """Median change of each metric over ``clips`` clips, between the loader's frames and an independent resampling."""

    clips: int = 0
    changes: ClipMetrics = field(default_factory=dict)


@dataclass(frozen=True)
class SoftnessRecord:
    """Summary of the sharpness of all prepared clips.

    ``measured``: clips that were measured. ``upscaled``: number of clips smaller than wanted, by size (``WxH``).
    ``scaled_up``: by clip, the size that it looks scaled up from. ``groups``: None where the clips are one group.
    """

    measured: int = 0
    upscaled: dict[str, int] = field(default_factory=dict)
    scaled_up: dict[str, str] = field(default_factory=dict)
    groups: SoftGroup | None = None
    loader: LoaderChanges = field(default_factory=LoaderChanges)


@dataclass(frozen=True)
class CacheSettings:
    """Settings that shaped the prepared clips. ``image_variants``: noised first frames stored of each clip.

    ``holdout``: number of clips that were asked to be held out; None in an index of a version that did not store it.
    """

    frames: int
    height: int
    width: int
    fps: float
    resize: str
    crop: str
    window: str
    seed: int
    max_length: int
    buckets: Annotated[list[str], OMIT_EMPTY] = field(default_factory=list)
    image_variants: Annotated[int, OMIT_EMPTY] = 0
    holdout: Annotated[int | None, OMIT_NONE] = None


@dataclass(frozen=True)
class CacheCounts:
    """Numbers of clips: unreadable ones that were left out, ones smaller than wanted, ones with fewer frames per
    second.

    ``longer``: much longer than what is taken of a clip; ``seconds`` and ``taken_seconds`` are sums over all clips.
    ``cropped``: a large share of the picture is cut off. ``duplicates``: of the same content as an earlier clip.
    """

    unreadable: int
    upscaled: int
    slower: int
    longer: Annotated[int, OMIT_EMPTY] = 0
    cropped: Annotated[int, OMIT_EMPTY] = 0
    duplicates: Annotated[int, OMIT_EMPTY] = 0
    seconds: Annotated[float, OMIT_EMPTY] = 0.0
    taken_seconds: Annotated[float, OMIT_EMPTY] = 0.0


@dataclass(frozen=True)
class CaptionEntry:
    """Key and shard of a caption's embedding."""

    caption: str
    text_shard: str


@dataclass(frozen=True)
class CacheEntry:
    """One clip: ``clip`` and ``caption`` are the keys of its tensors in the files ``clip_shard`` and ``text_shard``.

    ``size`` and ``modified_ns``: bytes and time of modification of its file when it was prepared; None in an index of a
    version that did not store them.
    """

    key: str
    name: str
    text: str
    clip: str
    clip_shard: str
    caption: str
    text_shard: str
    bucket: Annotated[str | None, OMIT_NONE] = None
    size: Annotated[int | None, OMIT_NONE] = None
    modified_ns: Annotated[int | None, OMIT_NONE] = None


@dataclass(frozen=True)
class CacheIndex(Record):
    """``index.json``. ``plan``: hash of all inputs of the preparation; ``fingerprint``: hash of the prepared content.

    ``models``: hashes of what encoded the clips. ``train`` and ``holdout`` are positions in ``entries``.
    """

    file_name: ClassVar[str] = "index.json"
    advice: ClassVar[str] = "run stage=prepare again, it writes a new one"
    error: ClassVar[type[UserError]] = DataError
    max_bytes: ClassVar[int] = 1 << 30

    plan: str
    fingerprint: str
    settings: CacheSettings
    models: dict[str, str]
    counts: CacheCounts
    empty: CaptionEntry
    train: list[int]
    holdout: list[int]
    entries: list[CacheEntry]
    softness: SoftnessRecord = field(default_factory=SoftnessRecord)

    @classmethod
    def upgrade(cls, values: RawRecord, version: int) -> RawRecord:
        """Refuse an index without a version: cogflow never wrote one."""
        raise ValueError("an index has a version")


@dataclass(frozen=True)
class SourceMeasurement:
    """A clip's file at its own size: metrics of some frames, and how much detail its frames hold.

    ``effective``: height and width of the smallest picture that holds the detail; ``reach``: share of the frequencies
    that hold detail, vertically and horizontally; ``scaled_up``: whether the clip looks scaled up from that size.
    """

    metrics: ClipMetrics
    effective: tuple[int, int]
    scaled_up: bool
    reach: tuple[float, ...]
    detail: Measured


@dataclass(frozen=True)
class ClipMeasurement:
    """Measurements of one prepared clip. ``loader``: change of each metric against an independent resampling."""

    metrics: ClipMetrics
    source: SourceMeasurement
    detail: Measured
    loader: Annotated[ClipMetrics | None, OMIT_NONE] = None


@dataclass(frozen=True)
class StoredClip(Record):
    """Record stored with a clip's tensors: size (height, width), rate and frame count of its file, and measurements."""

    advice: ClassVar[str] = "Remove the file and run stage=prepare again."
    error: ClassVar[type[UserError]] = DataError

    upscaled: bool
    size: tuple[int, int]
    fps: float
    frames: int
    measurement: Annotated[ClipMeasurement | None, OMIT_NONE] = None

    @classmethod
    def upgrade(cls, values: RawRecord, version: int) -> RawRecord:
        """Version 0 holds the measurements beside the clip's own facts, with metrics as ``panel``."""
        if not values.get("panel"):
            return values
        source = values["source"]
        measurement = {
            "metrics": values["panel"],
            "source": {**source, "metrics": source["panel"]},
            "detail": values["detail"],
            "loader": values.get("loader"),
        }
        return {**values, "measurement": measurement}
