"""Forecast the memory of one GPU and of one machine, by part and by phase.

The phases are the start, the forward and backward passes, the optimizer step and a validation. The largest phase
decides whether a training fits. The formulas follow DeepSpeed 0.19 (``stage_1_and_2.py``, ``stage3.py``) and cogflow's
loading, averaging and sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

from cogflow.training.gpu_layout import GpuLayout
from cogflow.training.transformer_size import Tokens, TransformerSize

SAVED, WORKING, INFERENCE = 22.1, 28.0, 13.0
"""Memory of one block in copies of its hidden states (tokens x width, in the training dtype): kept for the backward
pass, allocated at the peak of forward plus backward, and allocated without gradients. The numbers count every
allocation of diffusers' block. A test counts the first again."""

KEPT = {"nothing": 1.0, "attention": 2.03, "products": 7.03, "all": 11.03, "everything": SAVED}
"""Copies of the hidden states that a block keeps, by ``deepspeed.checkpoint_keep``. A test counts them.

* ``nothing``: the block's input
* ``attention``: also the output of attention with its log-sum-exp values
* ``products``: also the results of all linear layers but the widest
* ``all``: also the results of the widest linear layer
* ``everything``: all values that the backward pass needs; nothing is recomputed
"""

SUBGROUP = 10**9
"""Number of elements that ZeRO-3 updates at once."""

ENCODER = 4_762_310_656
"""Parameters of T5 v1.1 XXL's encoder, which embeds the validation's prompts before the transformer is loaded."""

VAE = 215_583_907
"""Parameters of CogVideoX's autoencoder."""

DECODING, TILE = 22_900.0, (240, 360)
"""Elements per pixel that are allocated while the VAE decodes two latent frames after others, and the size of one
tile in pixels."""

CONTEXT, FRAGMENTS = 1.5e9, 0.05
"""Bytes that CUDA, NCCL and cuBLAS use, and the share of the other memory that fragmentation wastes."""

PROCESS = 3e9
"""Host memory of one process in bytes: Python, torch's libraries and the mappings of CUDA."""

LIVE = 4
"""Number of gather buckets of parameters that ZeRO-3 may hold gathered at once, as cogflow configures it."""


@dataclass(frozen=True)
class Sampling:
    """Size of the clips that a validation samples: ``frames`` frames, ``passes`` of the transformer at once (2 with
    guidance)."""

    frames: int
    height: int
    width: int
    passes: int
    vae_bytes: int
    tiled: bool


@dataclass(frozen=True)
class Memory:
    """Bytes by part and by phase. A phase adds up the parts that are allocated at the same time."""

    parts: dict[str, float]
    phases: dict[str, float]

    @property
    def peak(self) -> float:
        return max(self.phases.values())

    @property
    def worst(self) -> str:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: self.phases[phase])


def gpu(
    shape: TransformerSize, tokens: Tokens, layout: GpuLayout, sampling: Sampling | None, *, encoder: float = ENCODER
) -> Memory:
    """Return the memory of each GPU. ``encoder``: parameters of the text encoder; ``sampling``: ``None`` without
    validations."""
    trained, size, share = shape.trained, layout.bytes, 1 / layout.gpus
    whole = layout.zero_stage < 3
    sharded = share if layout.zero_stage > 0 else 1.0
    half = size < 4
    parts: dict[str, float] = {}
    on_host = layout.offload_parameters
    weights_share = 0.0 if on_host else share
    parts["weights"] = shape.parameters * size * (1.0 if whole else weights_share)
    live = min(shape.parameters, max(LIVE * layout.gather_bucket, 10**6)) + min(shape.parameters, layout.gather_bucket)
    parts["weights gathered"] = 0.0 if whole else min(live, shape.parameters) * size
    parts["fp32 master"] = (
        0.0 if layout.offload_optimizer or (layout.zero_stage == 0 and not half) else 4 * trained * sharded
    )
    parts["optimizer states"] = 0.0 if layout.offload_optimizer else 8 * trained * sharded
    parts["gradients"] = _gradients(trained, layout)
    doubled = 2 if layout.overlap and whole and layout.gpus > 1 else 1
    # A wider dtype of the reduction needs a copy of the bucket that is sent.
    carried = layout.reduced_bytes if layout.reduced_bytes > size and layout.gpus > 1 else 0
    parts["buckets"] = layout.reduce_bucket * (size * doubled + carried) if layout.zero_stage > 0 else 0.0
    # The copies for the exchanges of a shared sequence are allocated in attention, where less memory is in use than in
    # the feed-forward layer.
    hidden = tokens.total / layout.sequence * shape.width * size * layout.batch
    again = layout.recomputed(shape.layers)
    parts["activations"] = hidden * sum(count * KEPT[keep] for keep, count in layout.kept(shape.layers).items())
    parts["temporary peak"] = WORKING * hidden if again else (WORKING - SAVED) * hidden
    parts["optimizer step"] = _step(trained, layout)
    parts["EMA"] = 0.0 if not layout.ema or layout.ema_on_host else 4 * shape.parameters * share
    parts["sampling"] = _sampling(shape, tokens, layout, sampling) if sampling else 0.0
    resident = parts["weights"] + parts["fp32 master"] + parts["optimizer states"] + parts["EMA"]
    phases = {
        "start": max(encoder * size, _start(shape, layout)),
        "forward and backward": resident
        + sum(parts[name] for name in ("weights gathered", "gradients", "buckets", "activations", "temporary peak")),
        "optimizer step": resident + parts["gradients"] + parts["optimizer step"],
    }
    if sampling:
        phases["validation"] = resident + parts["weights gathered"] + parts["sampling"]
    return Memory(parts, {name: bytes + CONTEXT + FRAGMENTS * bytes for name, bytes in phases.items()})


def _gradients(trained: int, layout: GpuLayout) -> float:
    """Return the bytes of the gradients after the backward pass. Half-precision training without ZeRO also keeps them
    in fp32."""
    if layout.zero_stage == 0:
        return trained * (layout.bytes + (4 if layout.bytes < 4 else 0))
    if layout.zero_stage == 1:
        return float(trained * layout.bytes)
    # With offloading each bucket goes to the host as soon as it is reduced.
    return 0.0 if layout.offload_optimizer else trained * layout.bytes / layout.gpus


def _step(trained: int, layout: GpuLayout) -> float:
    """Return the bytes of the fp32 copy of the gradients that the update makes."""
    if layout.zero_stage == 0 or layout.offload_optimizer:
        return 0.0
    part = trained / layout.gpus
    if layout.zero_stage == 3:
        return 4 * min(SUBGROUP, part)
    return 4 * part


def _start(shape: TransformerSize, layout: GpuLayout) -> float:
    """Return the bytes while DeepSpeed is initialised: one shard under ZeRO-3, else all weights. ZeRO-1 and 2 need
    twice the weights, because they make a flat copy."""
    weights = shape.parameters * layout.bytes
    if layout.zero_stage == 3:
        return weights / layout.gpus
    return float(2 * weights if layout.zero_stage in (1, 2) else weights)


def _sampling(shape: TransformerSize, tokens: Tokens, layout: GpuLayout, sampling: Sampling) -> float:
    """Return the larger of the bytes of denoising and of decoding, including the VAE."""
    denoising = INFERENCE * tokens.total * shape.width * layout.bytes * sampling.passes
    return VAE * sampling.vae_bytes + max(denoising, decoding(sampling))


def decoding(sampling: Sampling) -> float:
    """Return the bytes that decoding one clip needs in addition to the weights of the autoencoder."""
    pixels = sampling.height * sampling.width
    video = 3 * sampling.frames * pixels * sampling.vae_bytes
    at_once = min(pixels, TILE[0] * TILE[1]) if sampling.tiled else pixels
    return DECODING * at_once * sampling.vae_bytes + video


def host(shape: TransformerSize, layout: GpuLayout, *, validates: bool, encoder: float = ENCODER) -> Memory:
    """Return the memory of one machine with ``layout.local`` processes."""
    trained, size, local = shape.trained, layout.bytes, layout.local
    share = local / layout.gpus
    parts: dict[str, float] = {"processes": local * PROCESS}
    parts["optimizer states"] = 12 * trained * share if layout.offload_optimizer else 0.0
    gradients = size + 4 if layout.zero_stage == 3 else 4
    parts["gradients"] = gradients * trained * share if layout.offload_optimizer else 0.0
    # ZeRO-1 and 2 copy the updated weights to the GPU through a separate buffer.
    parts["weights"] = (
        size * trained * share
        if layout.offload_parameters or (layout.offload_optimizer and layout.zero_stage < 3)
        else 0.0
    )
    parts["EMA"] = 4 * shape.parameters * share if layout.ema and layout.ema_on_host else 0.0
    parts["VAE"] = local * VAE * 4.0 if validates else 0.0
    # One process loads the text encoder for all. The transformer's weights are loaded one tensor at a time.
    parts["loading"] = encoder * size
    # A validation replaces the weights by their averages. Each process keeps its share of the weights meanwhile.
    parts["weights set aside"] = shape.parameters * size * share if layout.ema and validates else 0.0
    steady = sum(parts[name] for name in ("processes", "optimizer states", "gradients", "weights", "EMA", "VAE"))
    return Memory(
        parts,
        {
            "start": parts["processes"] + parts["VAE"] + parts["loading"],
            "training": steady,
            "validation": steady + parts["weights set aside"],
        },
    )
