"""The stages: one module each, with ``run(config) -> None``. Loading one is what imports torch; naming them is not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol, cast

from cogflow.config.schema import Config

SUMMARIES: dict[str, str] = {
    "flow": "prepare, train, export, assemble and diagnose on one config: the whole way to a checked pipeline",
    "prepare": "clips and captions become cached latents and text embeddings",
    "train": "full finetuning on DeepSpeed, with checkpoints, samples and held-out losses",
    "sample": "videos of a run, a checkpoint or a pipeline folder, with their sharpness",
    "export": "weights of SAT, DeepSpeed or cogflow become diffusers components, proven equal; and back to SAT",
    "assemble": "components from different places become one checked pipeline folder",
    "diagnose": "which component, field or tensor makes a pipeline blurry, and the command that mends it",
    "pretrain": "train the tiny model that comes with cogflow from nothing",
    "benchmark": "speed and memory of cogflow beside what it competes with",
}
"""Name of each stage and what it does, in the order in which they are shown."""


class Stage(Protocol):
    run: Callable[[Config], None]


def load(name: str) -> Stage:
    """The module of a stage; ``name`` is a key of :data:`SUMMARIES`."""
    return cast(Stage, importlib.import_module(f"cogflow.stages.{name}"))
