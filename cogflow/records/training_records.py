"""Files of a run's checkpoints: ``trainer.json`` and ``latest.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from cogflow.files.record_io import OMIT_NONE, JsonObject, Measured, RawRecord, Record


@dataclass(frozen=True)
class ModelIdentity:
    """The model that a run was trained from: the settings ``model.name``, ``model.path`` and ``model.dtype``."""

    name: str
    path: str | None = None
    dtype: str = "auto"


@dataclass(frozen=True)
class TrainedWith:
    """Settings of VAE, scheduler and text encoder that the weights depend on. None: unknown.

    With other values the same weights give blurred or broken videos.
    """

    scaling_factor: Annotated[float | None, OMIT_NONE] = None
    invert_scale_latents: Annotated[bool | None, OMIT_NONE] = None
    snr_shift_scale: Annotated[float | None, OMIT_NONE] = None
    prediction_type: Annotated[str | None, OMIT_NONE] = None
    timestep_spacing: Annotated[str | None, OMIT_NONE] = None
    rescale_betas_zero_snr: Annotated[bool | None, OMIT_NONE] = None
    dtype: Annotated[str | None, OMIT_NONE] = None
    max_sequence_length: Annotated[int | None, OMIT_NONE] = None

    def known(self) -> dict[str, float | bool | str | int]:
        """Return the settings that are known, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class RankLayout:
    """Division of the work of one step over ranks. The keys are the names of the settings."""

    batch_size: Annotated[int, Field(alias="stage.batch_size")]
    gradient_accumulation: Annotated[int, Field(alias="stage.gradient_accumulation")]
    world_size: Annotated[int, Field(alias="world size")]
    zero_stage: Annotated[int, Field(alias="deepspeed.zero_stage")]
    offload_optimizer: Annotated[bool, Field(alias="deepspeed.offload_optimizer")]
    sequence_parallel: Annotated[int, Field(alias="parallel.sequence")] = 1


@dataclass(frozen=True)
class TunableSettings:
    """Settings of ``stage=train`` that may change when a run is resumed, with a warning."""

    steps: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    min_lr_ratio: float
    betas: list[float]
    eps: float
    weight_decay: float
    gradient_clipping: float
    text_dropout: float
    ema_decay: float
    ema_every: int
    ema_warmup: bool
    on_spike: str


@dataclass(frozen=True)
class ValidationRecord:
    """The verdict of the quality watch at a validation.

    ``message`` is empty where nothing is wrong. ``defects``: those found at any level. ``heldout_loss``: None where it
    was not measured at that step.
    """

    step: int
    level: str
    score: Measured
    defects: list[str]
    message: str
    heldout_loss: Measured | None = None


@dataclass(frozen=True)
class HeldoutLoss:
    """The mean loss on the held-out clips after ``step`` steps."""

    step: int
    loss: Measured


@dataclass(frozen=True)
class TrendRecord:
    """State of :class:`cogflow.sharpness.trend.Trend`.

    ``reported``: step by kind and level of each change that was reported.
    """

    quarters: dict[str, dict[str, int | float]] = field(default_factory=dict)
    means: dict[str, list[float]] = field(default_factory=dict)
    reported: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SpikeWindow:
    """Logarithms of the last losses or gradient norms. ``above``: how many spikes followed each other at the end."""

    values: list[float] = field(default_factory=list)
    above: int = 0


@dataclass(frozen=True)
class SpikeRecord:
    """The windows that spikes are found in."""

    loss: SpikeWindow = field(default_factory=SpikeWindow)
    norm: SpikeWindow = field(default_factory=SpikeWindow)


@dataclass(frozen=True)
class SkippedSteps:
    """Steps whose update was not applied."""

    total: int = 0
    in_a_row: int = 0


@dataclass(frozen=True)
class EmaCheckRecord:
    """State of :class:`cogflow.training.evaluation.EmaCheck`.

    ``first``: the first held-out loss of the model. ``reported_step``: when it was reported that the EMA is behind.
    """

    first: Measured | None = None
    behind: int = 0
    reported_step: int | None = None


@dataclass(frozen=True)
class OverfittingRecord:
    """State of :class:`cogflow.training.evaluation.OverfittingCheck`.

    ``reported_step``: when overfitting was reported.
    """

    lowest: HeldoutLoss | None = None
    above: int = 0
    reported_step: int | None = None


@dataclass(frozen=True)
class StepMonitorState:
    """State of :class:`cogflow.training.step_monitor.StepMonitor`."""

    trend: TrendRecord = field(default_factory=TrendRecord)
    spikes: SpikeRecord = field(default_factory=SpikeRecord)
    skipped: SkippedSteps = field(default_factory=SkippedSteps)


@dataclass(frozen=True)
class EvaluationState:
    """State of :class:`cogflow.training.evaluation.Evaluation`. ``last``: result of the newest evaluation."""

    ema_check: EmaCheckRecord = field(default_factory=EmaCheckRecord)
    overfitting: OverfittingRecord = field(default_factory=OverfittingRecord)
    last: HeldoutLoss | None = None


@dataclass(frozen=True)
class CallbackStates:
    """States of the callbacks of the training loop."""

    step_monitor: StepMonitorState = field(default_factory=StepMonitorState)
    evaluation: EvaluationState = field(default_factory=EvaluationState)


@dataclass(frozen=True)
class TrainerRecord(Record):
    """``trainer.json`` of a checkpoint: how far training was, what it was trained with, and the state of its monitors.

    ``identity``: values that a resumed run must share, by setting. ``last_good_step``: step of the last validation
    without a finding. ``line``: the line of the run's history that it was saved on. ``pending``: the run stopped on a
    signal, and the work due after ``step`` (evaluation, validation) is left to the resumed run.
    """

    file_name: ClassVar[str] = "trainer.json"
    advice: ClassVar[str] = "Resume from another checkpoint."

    step: int
    family: str
    model: ModelIdentity
    trained_with: TrainedWith
    identity: JsonObject
    layout: RankLayout
    settings: TunableSettings
    ema_updates: int = 0
    validation: ValidationRecord | None = None
    last_good_step: int | None = None
    callbacks: CallbackStates = field(default_factory=CallbackStates)
    pending: bool = False
    line: int = 1

    @classmethod
    def upgrade(cls, values: RawRecord, version: int) -> RawRecord:
        """Convert version 0.

        It names the last good step ``quiet``, pending work ``owed`` and the step of a report ``told``, and does not
        group the states of callbacks.
        """
        known = {"step", "family", "model", "trained_with", "identity", "layout", "settings", "ema_updates"}
        upgraded = {name: value for name, value in values.items() if name in known}
        upgraded |= {"last_good_step": values.get("quiet"), "pending": bool(values.get("owed"))}
        if verdict := values.get("validation"):
            upgraded["validation"] = {**verdict, "defects": verdict["kinds"], "message": verdict["line"]}
        monitor = {name: values[name] for name in ("spikes", "skipped") if values.get(name)}
        if trend := values.get("trend"):
            monitor["trend"] = {**trend, "reported": trend.get("told", {})}
        evaluation: RawRecord = {"last": values.get("heldout")}
        if averages := values.get("averages"):
            evaluation["ema_check"] = {**averages, "reported_step": averages.get("told")}
        if overfitting := values.get("overfitting"):
            lowest = overfitting.get("lowest")
            evaluation["overfitting"] = {
                "lowest": {"step": int(lowest[0]), "loss": lowest[1]} if lowest else None,
                "above": overfitting.get("above", 0),
                "reported_step": overfitting.get("told"),
            }
        return {**upgraded, "callbacks": {"step_monitor": monitor, "evaluation": evaluation}}


@dataclass(frozen=True)
class TrainingFacts(Record):
    """The keys of ``trainer.json`` that an export of the checkpoint needs. None: unknown."""

    version: ClassVar[int] = TrainerRecord.version
    file_name: ClassVar[str] = TrainerRecord.file_name
    advice: ClassVar[str] = "Take another checkpoint, or bring the file back."

    step: int | None = None
    line: int = 1
    family: str | None = None
    model: ModelIdentity | None = None
    trained_with: TrainedWith | None = None


@dataclass(frozen=True)
class LatestCheckpoint(Record):
    """``checkpoints/latest.json``: the newest checkpoint that was read back as it was written, and its size."""

    file_name: ClassVar[str] = "latest.json"

    step: int
    checkpoint: str
    bytes: int
