"""``assembly.json`` of a pipeline folder and ``diagnosis.json`` of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from cogflow.errors import PipelineError, UserError
from cogflow.files.publish import FileHash
from cogflow.files.record_io import OMIT_NONE, JsonObject, JsonValue, Measured, RawRecord, Record
from cogflow.records.export_records import FactRow
from cogflow.records.ladder_records import ToleranceRecord
from cogflow.records.training_records import ModelIdentity, TrainedWith


@dataclass(frozen=True)
class ChangedValue:
    """A config value that ``stage.set`` changed."""

    before: JsonValue
    now: JsonValue


@dataclass(frozen=True)
class AssembledComponent:
    """One component: class, origin folder and files.

    ``link``: how its weights got there. ``shared``: the path that a hard-linked file shares its bytes with, by file.
    ``changed``: values that were set. ``run``: absolute path of the run that trained it, or that its folder is in;
    ``line`` and ``step`` of that training.
    """

    class_name: Annotated[str, Field(alias="class")]
    origin: Annotated[str, Field(alias="from")]
    files: dict[str, FileHash]
    link: Annotated[str | None, OMIT_NONE] = None
    shared: Annotated[dict[str, str] | None, OMIT_NONE] = None
    changed: Annotated[dict[str, ChangedValue] | None, Field(alias="set"), OMIT_NONE] = None
    run: Annotated[str | None, OMIT_NONE] = None
    line: Annotated[int | None, OMIT_NONE] = None
    step: Annotated[int | None, OMIT_NONE] = None


@dataclass(frozen=True)
class TransformerOrigin:
    """Facts of the training of a transformer: the keys of its ``export.json`` that a pipeline keeps.

    ``run``: absolute path of the run that trained it. ``line`` and ``step``: of that run's history. None: unknown.
    """

    source: Annotated[str | None, OMIT_NONE] = None
    run: Annotated[str | None, OMIT_NONE] = None
    line: Annotated[int | None, OMIT_NONE] = None
    step: Annotated[int | None, OMIT_NONE] = None
    weights: Annotated[str | None, OMIT_NONE] = None
    family: Annotated[str | None, OMIT_NONE] = None
    model: Annotated[ModelIdentity | None, OMIT_NONE] = None
    trained_with: Annotated[TrainedWith | None, OMIT_NONE] = None
    facts: Annotated[list[FactRow] | None, OMIT_NONE] = None
    dtype: Annotated[str | None, OMIT_NONE] = None
    source_weights_sha256: Annotated[str | None, OMIT_NONE] = None
    weights_sha256: Annotated[str | None, OMIT_NONE] = None


@dataclass(frozen=True)
class ExportedTransformer(TransformerOrigin, Record):
    """The keys of ``export.json`` that a pipeline keeps."""

    file_name: ClassVar[str] = "export.json"
    advice: ClassVar[str] = "Export the transformer again."
    error: ClassVar[type[UserError]] = PipelineError


@dataclass(frozen=True)
class ContradictionRecord:
    """A contradiction that ``stage.force`` passed over: ``key`` has ``value`` by ``source``, and should have
    ``needed``."""

    key: str
    value: JsonValue
    source: str
    why: str
    needed: JsonValue
    needed_source: str
    override: str


@dataclass(frozen=True)
class PipelineSampling:
    """Settings to sample the pipeline with. ``origin``: the source of these values. None: unknown."""

    height: int
    width: int
    frames: int
    fps: float
    steps: int
    guidance_scale: float
    use_dynamic_cfg: bool
    dtype: str
    max_sequence_length: Annotated[int | None, OMIT_NONE] = None
    text: Annotated[str | None, OMIT_NONE] = None
    origin: Annotated[str | None, Field(alias="from"), OMIT_NONE] = None
    sampler: Annotated[str | None, OMIT_NONE] = None
    scheduler: Annotated[str | None, OMIT_NONE] = None
    unconditional: Annotated[str | None, OMIT_NONE] = None
    vae_dtype: Annotated[str | None, OMIT_NONE] = None
    vae_tiling: Annotated[bool | None, OMIT_NONE] = None


@dataclass(frozen=True)
class VerifiedSample:
    """One sample of the assembled folder against the run's own frames: PSNR in dB, largest difference of a value of
    255."""

    name: str
    psnr: Measured
    max_difference: int


@dataclass(frozen=True)
class VerifyRecord:
    """Result of the check that the folder gives the run's own videos.

    ``status``: passed, skipped, failed or repaired; other keys depend on it.
    """

    status: str
    reason: Annotated[str | None, OMIT_NONE] = None
    message: Annotated[str | None, OMIT_NONE] = None
    line: Annotated[str | None, OMIT_NONE] = None
    before: Annotated[Measured | None, OMIT_NONE] = None
    after: Annotated[Measured | None, OMIT_NONE] = None
    samples_of: Annotated[str | None, OMIT_NONE] = None
    step: Annotated[int | None, OMIT_NONE] = None
    dtype: Annotated[str | None, OMIT_NONE] = None
    allowed: Annotated[ToleranceRecord | None, OMIT_NONE] = None
    samples: Annotated[list[VerifiedSample] | None, OMIT_NONE] = None
    seconds: Annotated[float | None, OMIT_NONE] = None


@dataclass(frozen=True)
class AssemblyRecord(Record):
    """``assembly.json``.

    ``made``: how the transformer was trained. ``checked_against``: settings that the components must have.

    ``forced``: contradictions that ``stage.force`` passed over. ``verify``: None while the folder is not checked yet.
    """

    file_name: ClassVar[str] = "assembly.json"
    advice: ClassVar[str] = "Assemble the pipeline again."
    error: ClassVar[type[UserError]] = PipelineError

    components: dict[str, AssembledComponent]
    made: TransformerOrigin
    checked_against: JsonObject
    sampling: PipelineSampling
    diffusers: str
    forced: Annotated[list[ContradictionRecord] | None, OMIT_NONE] = None
    verify: Annotated[VerifyRecord | None, OMIT_NONE] = None


@dataclass(frozen=True)
class FindingRecord:
    """A finding of a diagnosis.

    Either ``field`` (of a config) or ``tensor`` names the place; both are None for a component.
    """

    rung: int | None
    component: str
    kind: str
    candidate: JsonValue
    reference: JsonValue
    confidence: float
    why: str
    fix: str
    field: Annotated[str | None, OMIT_NONE] = None
    tensor: Annotated[str | None, OMIT_NONE] = None


@dataclass(frozen=True)
class RepairedFolder:
    """The folder that ``stage.fix=true`` wrote, its check, and the places of findings that are left as they were."""

    where: str
    verify: VerifyRecord
    left: list[str]


@dataclass(frozen=True)
class DiagnosisRecord(Record):
    """``diagnosis.json``.

    ``notes``: differences without harm. ``steps``: lines and measurements of each step, by name.
    """

    file_name: ClassVar[str] = "diagnosis.json"
    advice: ClassVar[str] = "Run stage=diagnose again."
    error: ClassVar[type[UserError]] = PipelineError

    agrees: bool
    verdict: str
    findings: list[FindingRecord]
    notes: list[FindingRecord]
    ruled_out: list[str]
    steps: dict[str, JsonObject]
    candidate: str
    reference: str
    command: str
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    repaired: Annotated[RepairedFolder | None, OMIT_NONE] = None

    @classmethod
    def upgrade(cls, values: RawRecord, version: int) -> RawRecord:
        """Version 0 names the components that were ruled out ``acquitted`` and the repaired folder ``mended``."""
        old = values.get("mended")
        repaired = old and {"where": old["where"], "left": old.get("left", []), "verify": old}
        return {**values, "ruled_out": values.get("acquitted", []), "repaired": repaired}
