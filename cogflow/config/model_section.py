"""Settings of the model that is trained or sampled: ``model.*``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogflow.config.problems import Problem
from cogflow.config.setting import one_of, setting

if TYPE_CHECKING:
    from cogflow.config.config import AnyConfig

MODELS = ("tiny", "cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v", "cogvideox1.5-5b", "cogvideox1.5-5b-i2v", "auto")
DTYPES = ("auto", "fp32", "bf16", "fp16")
TRAINING_STAGES = ("prepare", "train", "flow")
"""Stages that need clips and a pipeline to start from."""


@dataclass(frozen=True)
class ModelConfig:
    """``model.*``"""

    name: str = setting(
        "tiny",
        help="Member of the CogVideoX family. auto infers it from the files (stage=export, assemble and diagnose).",
        rule=one_of(*MODELS),
    )
    path: str | None = setting(
        None, help="Diffusers pipeline folder to start from. Default for tiny: the pipeline in the package."
    )
    dtype: str = setting(
        "auto",
        help="Dtype of the transformer. auto: the model's training dtype on a GPU, fp32 on a CPU.",
        rule=one_of(*DTYPES),
    )


def is_planned(config: AnyConfig) -> bool:
    """Return whether the command only prints a plan, which needs neither weights nor clips."""
    return config.stage.name == "train" and bool(config.stage.plan)


def check_model(config: AnyConfig) -> Iterator[Problem]:
    """Yield contradictions between ``model.*`` and the stage."""
    model, stage = config.model, config.stage.name
    trains = stage in TRAINING_STAGES
    if model.name == "auto" and (trains or stage == "benchmark"):
        yield Problem(
            f"model=auto: stage={stage} cannot infer the model; choose one of {', '.join(MODELS[:-1])}.",
            ("model.name",),
        )
    if trains and not is_planned(config) and model.name not in ("tiny", "auto") and model.path is None:
        yield Problem(
            f"model.path is missing: cogflow does not include the weights of model={model.name}; give the diffusers "
            "pipeline folder to start from.",
            ("model.name", "model.path"),
        )
