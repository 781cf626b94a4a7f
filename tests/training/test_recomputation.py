"""What is kept and what is computed again train the same, under every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cogflow.benchmarking.step import MemoryWatch, make_trainer, training
from cogflow.config.compose import compose
from cogflow.config.deepspeed import KEEPS, SHARDED_KEEPS
from cogflow.planning.plan import kept
from cogflow.training.loader import Loader

CPU = torch.device("cpu")


def norms(zero: int, keep: str | None) -> list[float]:
    """Gradient norms of two steps of the tiny model."""
    words = [f"deepspeed=zero{zero}", f"deepspeed.activation_checkpointing={str(keep is not None).lower()}"]
    config = compose(["stage=benchmark", "stage.what=step", "model=tiny", *words, *([f"deepspeed.checkpoint_keep={keep}"] if keep else [])])
    trainer = make_trainer(training(config, config.stage, 2), CPU, torch.float32, MemoryWatch(CPU))  # type: ignore[arg-type]
    with Loader(trainer.batch, 1, CPU) as loader:
        return [float(trainer.train_step(step, loader).norm) for step in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_gradients_do_not_depend_on_what_is_kept(zero: int) -> None:
    expected = norms(zero, None)
    for keep in ("auto", *(SHARDED_KEEPS if zero == 3 else KEEPS)):
        assert norms(zero, keep) == pytest.approx(expected, rel=1e-9), keep


def words(*more: str) -> Any:
    return compose(["stage=train", "model=cogvideox-5b", "stage.plan=true", "stage.plan_memory_gb=141", "stage.plan_gpus=8", *more])


def test_zero_3_keeps_nothing() -> None:
    assert kept(words("deepspeed=zero3")) == {"nothing": 42, "everything": 0}
    assert set(kept(words("deepspeed=zero3", "deepspeed.checkpoint_every_block=0")) or {}) == {"nothing", "everything"}
    assert kept(words("deepspeed=zero2")) == {"all": 42, "everything": 0}
