"""The complete configuration of one command: all sections, the settings of its stage, and the list of cross-checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

from cogflow.config.benchmark_settings import BenchmarkStage
from cogflow.config.data_section import DataConfig, check_data
from cogflow.config.deepspeed_section import (
    DeepSpeedConfig,
    ParallelConfig,
    SpeedConfig,
    check_deepspeed,
    check_parallel,
)
from cogflow.config.diagnose_settings import DiagnoseStage, FlowStage
from cogflow.config.export_settings import AssembleStage, ExportStage
from cogflow.config.model_section import ModelConfig, check_model
from cogflow.config.problems import Problem
from cogflow.config.run_section import RunConfig, TrackingConfig
from cogflow.config.sample_settings import SampleStage
from cogflow.config.sampling_section import SamplingConfig, check_sampling
from cogflow.config.setting import section
from cogflow.config.train_settings import PrepareStage, TrainStage, check_training

STAGES: dict[str, type] = {
    kind.name: kind
    for kind in (
        PrepareStage,
        TrainStage,
        SampleStage,
        ExportStage,
        AssembleStage,
        DiagnoseStage,
        FlowStage,
        BenchmarkStage,
    )
}
"""Settings of each stage by its name."""

StageT = TypeVar("StageT", covariant=True)
OtherT = TypeVar("OtherT")


@dataclass(frozen=True)
class Config(Generic[StageT]):
    """All settings of one command. The type parameter is the class of its stage's settings, as in
    ``Config[TrainStage]``."""

    stage: StageT
    run: RunConfig = section(RunConfig, help="Folder of the run.")
    model: ModelConfig = section(ModelConfig, help="Model.")
    data: DataConfig = section(DataConfig, help="Clips.")
    deepspeed: DeepSpeedConfig = section(DeepSpeedConfig, help="Sharding and recomputation.")
    parallel: ParallelConfig = section(ParallelConfig, help="Sequence parallelism.")
    speed: SpeedConfig = section(SpeedConfig, help="Kernels, compilation and prefetching.")
    sampling: SamplingConfig = section(SamplingConfig, help="Sampling of videos.")
    tracking: TrackingConfig = section(TrackingConfig, help="Experiment tracking.")

    def with_stage(self, stage: OtherT) -> Config[OtherT]:
        """Return the same settings for another stage."""
        return replace(cast("Config[Any]", self), stage=stage)


AnyConfig = Config[Any]
"""The settings of a command whose stage may be any."""

CROSS_CHECKS: tuple[Callable[[AnyConfig], Iterator[Problem]], ...] = (
    check_model,
    check_data,
    check_sampling,
    check_deepspeed,
    check_training,
    check_parallel,
)
"""Checks of settings that depend on each other. Each is defined beside its section."""
