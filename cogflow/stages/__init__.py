"""The stages: one module each, with ``run(config) -> None``. Loading one is what imports torch; naming them is not."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, cast

from cogflow.config.config import AnyConfig

SUMMARIES: dict[str, str] = {
    "flow": "prepare, train, export, assemble and diagnose on one config: the whole way to a checked pipeline",
    "prepare": "clips and captions become cached latents and text embeddings",
    "train": "full finetuning on DeepSpeed, with checkpoints, samples and held-out losses",
    "sample": "videos of a run, a checkpoint or a pipeline folder, with their sharpness",
    "export": "weights of SAT, DeepSpeed or cogflow become diffusers components, proven equal; and back to SAT",
    "assemble": "components from different places become one checked pipeline folder",
    "diagnose": "which component, field or tensor makes a pipeline blurry, and the command that mends it",
    "benchmark": "speed and memory of cogflow beside what it competes with",
}
"""Name of each stage and what it does, in the order in which they are shown."""


class Stage(Protocol):
    run: Callable[[AnyConfig], None]


def load(name: str) -> Stage:
    """The module of a stage; ``name`` is a key of :data:`SUMMARIES`."""
    module = f"cogflow.stages.{name}"
    if module not in sys.modules:
        with _no_garbage():
            importlib.import_module(module)
    return cast(Stage, sys.modules[module])


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Import without looking for garbage: a fifth of the time goes into looking through the same objects again and again.

    What was imported stays, and is not looked through later either: a quarter of a second each time, in the middle of a training."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        if collecting:
            gc.enable()
