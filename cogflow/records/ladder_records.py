"""``ladder.json``: the sharpness ladder of a run, one rung for each stage from source clips to exported pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from cogflow.files.record_io import OMIT_NONE, JsonValue, Measured, RawRecord, Record
from cogflow.records.cache_records import OMIT_EMPTY, SoftGroup
from cogflow.records.sample_records import ClipMetrics

MetricsByClip = dict[str, ClipMetrics]
"""Sharpness metrics by clip or sample."""


@dataclass(frozen=True)
class ClipSizes:
    """``WxH`` of a clip's frames, and of the smallest picture that holds their detail."""

    size: str
    effective: str


@dataclass(frozen=True)
class SourceRung:
    """Rung 0, the clips at their own size. ``scaled_up``: by clip, the size that it looks scaled up from."""

    metrics: MetricsByClip
    clips_in_all: int
    measured: int
    scaled_up: dict[str, str]
    groups: SoftGroup | None
    sizes: dict[str, ClipSizes]
    soft_style: bool


@dataclass(frozen=True)
class ClipRung:
    """Rung 1, the clips as the loader gives them.

    ``upscaled``: number of clips by size that are smaller than ``size``. ``loader``: by clip, the change of each metric
    against an independent resampling of the same frames. ``cache``: fingerprint of the prepared clips; None in records
    of versions that did not store it.
    """

    metrics: MetricsByClip
    clips_in_all: int
    upscaled: dict[str, int]
    size: str
    loader: MetricsByClip
    cache: Annotated[str | None, OMIT_NONE] = None


@dataclass(frozen=True)
class RoundtripIdentity:
    """Inputs of the round trip: the same values give the same rung."""

    cache: str
    vae: str | None
    scaling_factor: float
    vae_scaling_factor: float
    dtype: str
    tiling: bool
    device: str
    wanted: int


@dataclass(frozen=True)
class DecodingVariant:
    """Decoding in another precision or with tiling, compared with fp32 without tiles.

    ``chosen``: whether samples are decoded so. ``psnr`` in dB; ``finite``: share of finite values; ``failed``: an
    error.
    """

    chosen: bool
    psnr: Annotated[Measured | None, OMIT_NONE] = None
    finite: Annotated[float | None, OMIT_NONE] = None
    failed: Annotated[str | None, OMIT_NONE] = None


@dataclass(frozen=True)
class RoundtripRung:
    """Rung 2, clips through the VAE and back.

    ``psnr``: in dB by clip. ``clips``: the same clips' metrics before the round trip. ``non_finite``: clips whose
    decoded frames hold values that are not finite. ``scales``: median PSNR in dB by the factor that latents are
    multiplied with.
    """

    metrics: MetricsByClip
    identity: RoundtripIdentity
    psnr: dict[str, Measured]
    clips: MetricsByClip
    non_finite: list[str]
    scales: dict[str, Measured]
    variants: dict[str, DecodingVariant] = field(default_factory=dict)


@dataclass(frozen=True)
class FamilyContradiction:
    """A setting of scheduler or VAE that differs from the model family's value."""

    field: str
    value: JsonValue
    expected: JsonValue
    family: str


@dataclass(frozen=True)
class ScheduleErrors:
    """Mean squared velocity error by SNR shift, and the shift that the scheduler has."""

    configured: float
    errors: dict[str, Measured]


@dataclass(frozen=True)
class BaseRung:
    """Rung 3, samples before the first step. ``schedule``: None where it was not measured."""

    metrics: MetricsByClip
    step: int | None = None
    contradictions: list[FamilyContradiction] = field(default_factory=list)
    schedule: ScheduleErrors | None = None


@dataclass(frozen=True)
class WatchFinding:
    """A finding of the quality watch."""

    defect: str
    level: str
    metric: str
    size: Measured
    line: str


@dataclass(frozen=True)
class TunedRung:
    """Rung 4, the newest samples of training. ``watch``: findings of the quality watch; None where it did not judge.

    ``line``: the line of the run's history that the samples belong to; None in records of versions without a history.
    """

    metrics: MetricsByClip
    step: int | None
    weights: str | None
    watch: list[WatchFinding] | None = None
    line: Annotated[int | None, OMIT_NONE] = None


@dataclass(frozen=True)
class ToleranceRecord:
    """Largest difference of a value of 255, and lowest PSNR in dB, that count as equal."""

    max_difference: int
    psnr: float


@dataclass(frozen=True)
class ExportedRung:
    """Rung 5, samples of the exported folder in a fresh process.

    ``psnr``: in dB by sample, against the run's own frames. ``step`` and ``line``: of the training that was exported.
    """

    metrics: MetricsByClip
    psnr: dict[str, Measured]
    allowed: ToleranceRecord
    failed: bool
    dtype: str
    step: int | None = None
    line: Annotated[int | None, OMIT_NONE] = None


@dataclass(frozen=True)
class LadderRungs:
    """The rungs that were measured, by number in the file."""

    source: Annotated[SourceRung | None, Field(alias="0"), OMIT_NONE] = None
    clip: Annotated[ClipRung | None, Field(alias="1"), OMIT_NONE] = None
    roundtrip: Annotated[RoundtripRung | None, Field(alias="2"), OMIT_NONE] = None
    base: Annotated[BaseRung | None, Field(alias="3"), OMIT_NONE] = None
    tuned: Annotated[TunedRung | None, Field(alias="4"), OMIT_NONE] = None
    exported: Annotated[ExportedRung | None, Field(alias="5"), OMIT_NONE] = None


@dataclass(frozen=True)
class ChangeInterval:
    """A change of a metric between two rungs: its median and the 95 % bootstrap interval."""

    size: Measured
    low: Measured
    high: Measured


@dataclass(frozen=True)
class LadderRow:
    """One row of the ladder's table: ``rung`` compared with the rung ``against``, over ``pairs`` pairs of clips.

    ``step`` and ``line``: of the training, for rungs of samples. ``stale``: words that say why the row does not belong
    to the present step or clips; empty for a present row. ``renewal``: the command that measures a stale row again.
    """

    rung: int
    name: str
    count: int
    against: int | None
    paired: bool
    pairs: int
    changes: dict[str, ChangeInterval]
    psnr: Measured | None
    verdict: str
    step: Annotated[int | None, OMIT_NONE] = None
    line: Annotated[int | None, OMIT_NONE] = None
    stale: Annotated[str, OMIT_EMPTY] = ""
    renewal: Annotated[str, OMIT_EMPTY] = ""


@dataclass(frozen=True)
class LadderFinding:
    """A defect at ``rung``. ``level``: warning or alarm; ``field``: of a config, where one is at fault."""

    rung: int
    defect: str
    level: str
    line: str
    metric: str = ""
    size: Measured | None = None
    field: str = ""


@dataclass(frozen=True)
class LadderRecord(Record):
    """``ladder.json``: the measured rungs, and the table and findings that follow from them."""

    file_name: ClassVar[str] = "ladder.json"

    rungs: LadderRungs = field(default_factory=LadderRungs)
    findings: list[LadderFinding] = field(default_factory=list)
    table: list[LadderRow] = field(default_factory=list)

    @classmethod
    def upgrade(cls, values: RawRecord, version: int) -> RawRecord:
        """Version 0 holds metrics as ``panels``, other keys of a rung in ``facts``, and variants beside the rungs."""
        rungs = {
            number: {"metrics": rung["panels"], **rung["facts"]}
            for number, rung in values["rungs"].items()
            if number in ("2", "3") or rung["panels"]
        }
        if "2" in rungs:
            rungs["2"]["variants"] = values.get("variants", {}).get("2", {})
        if (watch := rungs.get("4", {}).get("watch")) is not None:
            rungs["4"]["watch"] = [_renamed(one) for one in watch]
        return {**values, "rungs": rungs, "findings": [_renamed(one) for one in values.get("findings", [])]}


def _renamed(finding: RawRecord) -> RawRecord:
    return {"metric": finding.get("channel", ""), "defect": finding["kind"], **finding}
