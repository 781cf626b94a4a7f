"""Errors of memory and of the network, told as what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogflow.config.compose import compose
from cogflow.errors import CogflowError, MemoryExhausted
from cogflow.runtime.heartbeat import Watchdog
from cogflow.training.failures import less_memory, translate_errors


def raised(tmp_path: Path, error: BaseException, *words: str) -> BaseException:
    config = compose(["stage=train", "debug=quick", *words])
    with pytest.raises(BaseException) as caught, translate_errors(config, Watchdog(tmp_path, 0)):
        raise error
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ],
)
def test_no_memory_left_names_settings_that_need_less(tmp_path: Path, error: BaseException) -> None:
    found = raised(
        tmp_path, error, "stage.batch_size=4", "stage.gradient_accumulation=3", "stage.ema_decay=0.9", "deepspeed=zero2"
    )
    assert isinstance(found, MemoryExhausted) and found.exit_code == 2
    advice = f"{found} {found.hint}"
    for part in (
        "stage.batch_size=2 stage.gradient_accumulation=6",
        "stage.ema_device=cpu",
        "deepspeed=zero2_offload",
        "data.frames",
    ):
        assert part in advice


def test_what_is_set_already_is_not_advised() -> None:
    words = [
        "stage=train",
        "debug=quick",
        "deepspeed=zero3_offload",
        "stage.batch_size=1",
        "stage.ema_decay=0",
        "sampling.vae_tiling=true",
    ]
    advice = less_memory(compose([*words, "deepspeed.activation_checkpointing=true"]))
    for part in ("zero2", "zero3", "batch_size", "ema_device", "vae_tiling", "activation_checkpointing"):
        assert part not in advice
    assert "fewer data.frames" in advice
    every = less_memory(
        compose([*words, "deepspeed.activation_checkpointing=true", "deepspeed.checkpoint_every_block=2"])
    )
    assert "deepspeed.checkpoint_every_block=1" in every


def test_ranks_that_can_share_a_sequence_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["stage=train", "debug=quick", "stage.gradient_accumulation=3"]
    way = "parallel.sequence=2 stage.gradient_accumulation=6"
    assert way not in less_memory(compose(words))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert way in less_memory(compose(words))
    # The tiny model's 6 heads cannot be dealt to 4 ranks.
    assert "parallel.sequence=4" not in less_memory(compose([*words, "parallel.sequence=2"]))


def test_all_else_passes_as_it_is(tmp_path: Path) -> None:
    error = RuntimeError("mat1 and mat2 must have the same dtype")
    assert raised(tmp_path, error) is error
    # One rank has nobody to lose.
    alone = RuntimeError("Connection closed by peer")
    assert raised(tmp_path, alone) is alone
    assert not isinstance(error, CogflowError)
