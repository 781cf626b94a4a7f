"""Program of the tests' server: run DeepSpeed's updates on one rank in their own process.

DeepSpeed changes the process for good: ZeRO-3 replaces torch's linear layers. Words: FILE CASE ...; results go to
FILE.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cogflow.benchmarking.step import MemoryLog, make_trainer, train_config
from cogflow.config.compose import compose
from cogflow.config.deepspeed_section import DeepSpeedConfig
from cogflow.config.train_settings import TrainStage
from cogflow.runtime import ranks
from cogflow.training import optimizer_update
from cogflow.training.batch import Loader
from cogflow.training.engine import Engine

CPU = torch.device("cpu")
FUSE = optimizer_update.fuse_zero_update


def updated(zero: int, dtype: str, clipping: float, *, own: bool = False, spoilt: int | None = None) -> dict[str, Any]:
    """Return weights, gradient norms and applied flags of four steps; the gradient of step ``spoilt`` holds an
    infinity. ``own``: by DeepSpeed's own update.
    """
    called: list[int] = []
    optimizer_update.fuse_zero_update = (lambda *_: called.append(1)) if own else FUSE
    torch.manual_seed(0)
    half = getattr(torch, dtype)
    module = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.GELU(), torch.nn.Linear(13, 3)).to(half)
    stage = TrainStage(batch_size=1, gradient_accumulation=2, gradient_clipping=clipping)
    engine = Engine(module, DeepSpeedConfig(zero_stage=zero), stage, half)
    optimizer_update.fuse_zero_update = FUSE
    norms, applied = [], []
    for step in range(4):
        for _ in range(2):
            loss = engine.forward(torch.randn(5, 7, dtype=half)).square().mean()
            engine.backward(loss * (float("inf") if step == spoilt else 1.0))
            done = engine.step(1e-2)
        applied.append(done)
        norms.append(float(engine.gradient_norm()))
    weights = [weight.float().flatten().tolist() for _, weight in engine.weights()]
    return {"weights": sum(weights, []), "norms": norms, "applied": applied, "by itself": called == [1]}


def kept(zero: int, keep: str | None) -> list[float]:
    """Return gradient norms of two steps of the tiny model whose recomputed blocks keep ``keep``; ``None``: nothing is
    recomputed.
    """
    words = [f"deepspeed=zero{zero}", f"deepspeed.activation_checkpointing={str(keep is not None).lower()}"]
    config = compose(
        [
            "stage=benchmark",
            "stage.what=step",
            "model=tiny",
            *words,
            *([f"deepspeed.checkpoint_keep={keep}"] if keep else []),
        ]
    )
    trainer = make_trainer(train_config(config, 2), CPU, torch.float32, MemoryLog(CPU))
    with Loader(trainer.batches.batch, 1, CPU) as loader:
        return [float(trainer.train_step(step, loader).gradient_norm) for step in range(2)]


def main(arguments: Sequence[str]) -> None:
    """Run each case, a JSON object with the name of a function of this module and its arguments."""
    file, *cases = arguments
    found: list[Any] = []
    for case in map(json.loads, cases):
        found.append(updated(**case) if case.pop("what") == "updated" else kept(**case))
    Path(file).write_text(json.dumps(found))
    ranks.close()
