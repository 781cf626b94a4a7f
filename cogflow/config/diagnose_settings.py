"""Settings of the stages diagnose and flow."""

from __future__ import annotations

from dataclasses import dataclass

from cogflow.config.export_settings import AssembleStage, ExportStage
from cogflow.config.setting import above, at_least, each, kind_setting, section, setting
from cogflow.config.train_settings import PrepareStage, TrainStage


@dataclass(frozen=True)
class DiagnoseStage:
    """``stage.*`` of stage=diagnose: the component, field or tensor that makes a pipeline blurry."""

    name: str = setting("diagnose", help="Chosen by stage=diagnose.")
    candidate: str | None = setting(
        None, help="What to diagnose: a pipeline folder, a run, an export or a checkpoint. Default: this run."
    )
    candidate_kind: str = kind_setting("stage.candidate")
    reference: str | None = setting(
        None,
        help="A correct pipeline folder, run, export or checkpoint. Default: the declared facts of the model only.",
    )
    reference_kind: str = kind_setting("stage.reference")
    full: bool = setting(False, help="Run all checks, even if an early one explains everything.")
    fix: bool = setting(False, help="Write a repaired folder, and verify the repair.")
    output: str | None = setting(None, help="Folder that stage.fix writes. Default: <run>/repaired.")
    prompts: int = setting(2, help="Prompts sampled when components are swapped.", rule=at_least(1))
    clips: int = setting(4, help="Clips used to examine the weights.", rule=at_least(1))
    data: str | None = setting(
        None,
        help="Run whose prepared clips are used. Default: the run of candidate or reference, else drawn clips.",
    )
    scaling_factors: list[float] = setting(
        [], help="Scaling factors to try besides 0.7, 1.15258426 and 1/0.7.", rule=each(above(0))
    )
    snr_shift_scales: list[float] = setting([], help="SNR shifts to try besides 1 and 3.", rule=each(above(0)))


@dataclass(frozen=True)
class FlowStage:
    """``stage.*`` of stage=flow: prepare, train, export, assemble and diagnose on one config."""

    name: str = setting("flow", help="Chosen by stage=flow.")
    prepare: PrepareStage = section(PrepareStage, help="As for stage=prepare.")
    train: TrainStage = section(TrainStage, help="As for stage=train.")
    export: ExportStage = section(ExportStage, help="As for stage=export.")
    assemble: AssembleStage = section(AssembleStage, help="As for stage=assemble.")
    diagnose: DiagnoseStage = section(DiagnoseStage, help="As for stage=diagnose.")
