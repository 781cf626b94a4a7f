"""Compare memory and files by formula with a real model, a real update and a real checkpoint."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogflow.config.compose import compose
from cogflow.config.train_settings import TrainStage
from cogflow.models import tiny
from cogflow.planning import plan, run_size
from cogflow.training import gpu_memory, recomputation, sequence


class Alive(TorchDispatchMode):
    """Measures the largest number of bytes of results that are alive at once inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = tensor.untyped_storage().nbytes()
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self.gone, key)
        return results

    def gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def block_sizes(settings: dict[str, Any] | None = None) -> tuple[float, float, float]:
    """Kept for the backward pass, at the height of both passes, and at that of one without gradients, in copies of
    the hidden states.

    ``settings``: of attention, which is then the one that shares a sequence.
    """
    width, text, video, dtype = 384, 226, 8000, torch.bfloat16
    block = CogVideoXBlock(width, 6, 64, 512, attention_bias=True).to(dtype)
    if settings is not None:
        block.attn1.set_processor(sequence.UlyssesProcessor(block.attn1.processor))
    inputs = [torch.randn(1, count, width, dtype=dtype, requires_grad=True) for count in (video, text)]
    time = torch.randn(1, 512, dtype=dtype, requires_grad=True)
    rotary = (torch.randn(video, 64), torch.randn(video, 64))
    known = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), *inputs, time, *rotary)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in known:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with Alive() as both:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results = block(*inputs, time, rotary, settings)
        sum(result.sum() for result in results).backward()
    gradients = sum(parameter.grad.nbytes for parameter in block.parameters() if parameter.grad is not None)
    with torch.no_grad(), Alive() as one:
        block(*inputs, time, rotary, settings)
    unit = (text + video) * width * 2
    return sum(kept.values()) / unit, (both.peak - gradients) / unit, one.peak / unit


def test_a_block_keeps_what_the_formula_says() -> None:
    saved, working, inference = block_sizes()
    assert saved == pytest.approx(gpu_memory.SAVED, rel=0.02)
    assert working == pytest.approx(gpu_memory.WORKING, rel=0.1)
    assert inference == pytest.approx(gpu_memory.INFERENCE, rel=0.1)


def test_a_recomputed_block_keeps_what_the_formula_says() -> None:
    """Return the bytes after the forward pass, beyond those of a block that keeps only its input."""
    width, text, video, dtype = 384, 226, 8000, torch.bfloat16
    block = CogVideoXBlock(width, 6, 64, 512, attention_bias=True).to(dtype)
    inputs = [torch.randn(1, count, width, dtype=dtype, requires_grad=True) for count in (video, text)]
    time, rotary = (
        torch.randn(1, 512, dtype=dtype, requires_grad=True),
        (torch.randn(video, 64), torch.randn(video, 64)),
    )
    left = {}
    for keep in ("nothing", "attention", "products", "all"):
        with Alive() as alive:
            results = recomputation.RUNNERS[keep](None, block, *inputs, time, rotary)
        left[keep] = alive.now / ((text + video) * width * 2)
        del results
    for keep, copies in left.items():
        assert copies - left["nothing"] == pytest.approx(gpu_memory.KEPT[keep] - gpu_memory.KEPT["nothing"], abs=0.02)


def test_a_block_that_shares_its_sequence_keeps_no_more_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data to and from other ranks is as large as what a rank that shares with nobody sends to
    itself."""
    monkeypatch.setattr(sequence, "_all_to_all", lambda rows, *_: rows.clone())
    saved, working, _ = block_sizes({sequence.SHARD_ARGUMENT: sequence.SequenceShard(None, 0, (226,), (8000,))})
    assert saved == pytest.approx(gpu_memory.SAVED, rel=0.02)
    assert working == pytest.approx(gpu_memory.WORKING, rel=0.1)


@pytest.mark.parametrize(("tiled", "rel"), [(False, 0.02), (True, 0.1)])
def test_decoding_takes_what_the_formula_says(tiled: bool, rel: float) -> None:
    """Return the published autoencoder on the meta device."""
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(128, 256, 256, 512),
            layers_per_block=3,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
        )
    assert sum(parameter.numel() for parameter in vae.parameters()) == gpu_memory.VAE
    if tiled:
        vae.enable_tiling()
    with torch.no_grad(), Alive() as alive:
        vae.decode(torch.empty(1, 16, 5, 60, 90, device="meta"))
    formula = gpu_memory.decoding(
        gpu_memory.Sampling(frames=17, height=480, width=720, passes=2, vae_bytes=4, tiled=tiled)
    )
    assert formula == pytest.approx(alive.peak, rel=rel)


def states(words: list[str]) -> plan.Plan:
    return plan.plan(compose(["stage=train", "stage.plan=true", "debug=quick", *words]))


def test_parameters_gradients_and_optimizer_states_of_a_real_update() -> None:
    gc.collect()
    model = tiny.new_transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values()]
    parts = states(["deepspeed=zero0", "model.dtype=fp32"]).gpu.parts
    assert parts["weights"] == pytest.approx(sum(parameter.nbytes for parameter in model.parameters()), rel=0.05)
    assert parts["gradients"] == pytest.approx(sum(parameter.grad.nbytes for parameter in model.parameters()), rel=0.05)
    assert parts["optimizer states"] == pytest.approx(sum(tensor.nbytes for tensor in held), rel=0.05)


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_sixteen_bytes_a_parameter_lie_somewhere(zero: str) -> None:
    """bf16 weights, fp32 master and two moments: on the GPUs or on the hosts, and shared as the stage says."""
    made = plan.plan(
        compose(["stage=train", "stage.plan=true", "model=cogvideox-5b", f"deepspeed={zero}", "stage.plan_gpus=16"])
    )
    count = made.shape.parameters
    gpu, host = made.gpu.parts, made.host.parts
    states = 16 * (gpu["fp32 master"] + gpu["optimizer states"]) + 2 * host["optimizer states"]
    assert states == pytest.approx(12 * count)
    assert gpu["weights"] == pytest.approx({"zero3": 2 * count / 16, "zero3_offload": 0}.get(zero, 2 * count))
    gradients = {"zero1": 2 * count, "zero2": 2 * count / 16, "zero3": 2 * count / 16}
    assert gpu["gradients"] == pytest.approx(gradients.get(zero, 0))


def test_activation_checkpointing_keeps_one_input_a_block() -> None:
    words = ["stage=train", "stage.plan=true", "model=cogvideox-5b", "deepspeed.checkpoint_keep=nothing"]
    kept = plan.plan(compose(words)).gpu.parts["activations"]
    assert kept == pytest.approx(4.27 * 1024**3, rel=0.01)
    whole = plan.plan(compose([*words, "deepspeed.activation_checkpointing=false"])).gpu.parts["activations"]
    assert whole == pytest.approx(gpu_memory.SAVED * kept)


def test_the_most_checkpoints_at_once_are_counted() -> None:
    every = TrainStage(steps=1000, save_every=100, keep_last=2, keep_best=1, sample_every=100)
    assert run_size.at_once(every) == 5
    assert run_size.at_once(replace(every, sample_every=0, keep_best=0)) == 3
    assert run_size.at_once(replace(every, save_every=0)) == 1
    assert run_size.at_once(replace(every, steps=150)) == 2
    assert run_size.at_once(replace(every, keep_every=250)) == 5 + 2  # at 500 and 1000, where there are checkpoints
    assert run_size.weights_alone(every) == 0 and run_size.weights_alone(replace(every, weights_every=300)) == 3


def test_averages_lie_where_they_are_asked_for_once_over_all_ranks() -> None:
    words = [
        "stage=train",
        "stage.plan=true",
        "model=cogvideox-5b",
        "deepspeed=zero3",
        "stage.plan_gpus=16",
        "stage.ema_decay=0.999",
    ]
    beside, on_host = (plan.plan(compose([*words, f"stage.ema_device={where}"])) for where in ("auto", "cpu"))
    assert 16 * beside.gpu.parts["EMA"] == pytest.approx(4 * beside.shape.parameters) == 2 * on_host.host.parts["EMA"]
    assert beside.host.parts["EMA"] == on_host.gpu.parts["EMA"] == 0
    assert beside.gpu.peak > on_host.gpu.peak and beside.host.phases["training"] < on_host.host.phases["training"]


def test_every_other_block_recomputed_keeps_half_and_what_is_frozen_has_no_states() -> None:
    words = ["stage=train", "stage.plan=true", "model=cogvideox-5b", "deepspeed=zero2", "stage.plan_gpus=8"]
    words.append("deepspeed.checkpoint_keep=nothing")
    full, half = plan.plan(compose(words)), plan.plan(compose([*words, "deepspeed.checkpoint_every_block=2"]))
    assert half.gpu.parts["activations"] == pytest.approx(
        full.gpu.parts["activations"] * (21 + 21 * gpu_memory.SAVED) / 42
    )
    assert half.sample.recomputation == pytest.approx(full.sample.recomputation / 2)
    frozen = plan.plan(compose([*words, "stage.freeze=[transformer_blocks.*.ff.*]"]))
    assert frozen.shape.trained < 0.6 * full.shape.trained and frozen.shape.parameters == full.shape.parameters
    assert frozen.gpu.parts["optimizer states"] == pytest.approx(8 * frozen.shape.trained / 8)
