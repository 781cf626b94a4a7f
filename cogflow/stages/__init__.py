"""The stages, one module each, with ``run(config) -> None``.

This module does not import torch; :func:`load` imports a stage and with it torch.
"""

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
    "prepare": "encode clips and captions as cached latents and text embeddings",
    "train": "finetune all weights with DeepSpeed, with checkpoints, samples and held-out losses",
    "sample": "sample videos from a run, a checkpoint or a pipeline folder, and measure their sharpness",
    "export": "convert weights of SAT, DeepSpeed or cogflow to diffusers, or back to SAT, and prove them equal",
    "assemble": "join components from different places into one checked pipeline folder",
    "diagnose": "find the component, field or tensor that makes a pipeline blurry, and the command that repairs it",
    "benchmark": "measure speed and memory of cogflow beside other trainers",
}
"""Name of each stage and what it does, in the order of the help text."""


class Stage(Protocol):
    run: Callable[[AnyConfig], None]


def load(name: str) -> Stage:
    """Return the module of a stage; ``name`` is a key of :data:`SUMMARIES`."""
    module = f"cogflow.stages.{name}"
    if module not in sys.modules:
        with _without_garbage_collection():
            importlib.import_module(module)
    return cast(Stage, sys.modules[module])


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Import without garbage collection, which takes a fifth of the time of the imports.

    The imported objects stay for good, so they are frozen: later collections skip them. Otherwise each would take a
    quarter of a second during training.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        if collecting:
            gc.enable()
