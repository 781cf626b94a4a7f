"""Test that errors of memory and of the network become errors with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogflow.config.compose import compose
from cogflow.errors import CogflowError, MemoryExhausted
from cogflow.runtime.heartbeat import Watchdog
from cogflow.training.failures import MemoryAdvice, less_memory, translate_errors


def translated(tmp_path: Path, error: BaseException, *words: str) -> BaseException:
    """Return what an error becomes in a training."""
    config = compose(["stage=train", "debug=quick", *words])
    with pytest.raises((CogflowError, type(error))) as caught, translate_errors(config, Watchdog(tmp_path, 0)):
        raise error
    return caught.value


def advice(*words: str) -> list[str]:
    return [item.settings for item in less_memory(compose(["stage=train", "debug=quick", *words]))]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ],
)
def test_an_error_of_memory_names_settings_that_need_less(tmp_path: Path, error: BaseException) -> None:
    words = ["stage.batch_size=4", "stage.gradient_accumulation=3", "stage.ema_decay=0.9", "deepspeed=zero2"]
    found = translated(tmp_path, error, *words)
    assert isinstance(found, MemoryExhausted)
    assert found.exit_code == 2
    for settings in (
        "stage.batch_size=2 stage.gradient_accumulation=6 (the same clips in a step)",
        "stage.ema_device=cpu",
        "deepspeed=zero2_offload",
        "data.frames",
    ):
        assert settings in found.hint


def test_settings_in_use_are_not_advised() -> None:
    words = ["deepspeed=zero3_offload", "stage.batch_size=1", "stage.ema_decay=0", "sampling.vae_tiling=true"]
    words.append("deepspeed.activation_checkpointing=true")
    assert advice(*words, "deepspeed.checkpoint_every_block=1", "deepspeed.checkpoint_keep=nothing") == [
        "fewer data.frames, or a smaller data.height and data.width"
    ]
    assert advice(*words, "deepspeed.checkpoint_every_block=2")[0] == "deepspeed.checkpoint_every_block=1"


def test_sequence_parallelism_is_advised_where_ranks_and_heads_allow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = "parallel.sequence=2 stage.gradient_accumulation=6"
    assert settings not in advice("stage.gradient_accumulation=3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert settings in advice("stage.gradient_accumulation=3")
    # Four ranks cannot split the tiny model's 6 heads.
    assert not any("parallel.sequence=4" in item for item in advice("parallel.sequence=2"))


def test_advice_names_its_cost() -> None:
    assert str(MemoryAdvice("deepspeed=zero2")) == "deepspeed=zero2"
    assert str(MemoryAdvice("deepspeed=zero3", "sharded")) == "deepspeed=zero3 (sharded)"


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    error = RuntimeError("mat1 and mat2 must have the same dtype")
    assert translated(tmp_path, error) is error
    # A single rank cannot lose another.
    alone = RuntimeError("Connection closed by peer")
    assert translated(tmp_path, alone) is alone
