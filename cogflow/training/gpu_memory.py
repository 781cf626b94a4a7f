"""Memory of one GPU and of one machine, by part and by phase: what lies there before the first step, in the backward pass, at the
optimizer's step and at a validation. The largest phase decides.

Counted after DeepSpeed 0.19 (``stage_1_and_2.py``, ``stage3.py``) and this project's own loading, averaging and sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

from cogflow.training.gpu_layout import GpuLayout
from cogflow.training.transformer_size import Tokens, TransformerSize

SAVED, WORKING, INFERENCE = 22.1, 28.0, 13.0
"""Copies of the hidden states (tokens x width, in the training dtype) of one block: kept for the backward pass, alive at the height of
forward plus backward, and alive without gradients. Counted over every allocation of diffusers' block; a test counts the first again."""

KEPT = {"nothing": 1.0, "attention": 2.03, "products": 7.03, "all": 11.03, "everything": SAVED}
"""Copies of the hidden states that a block keeps, by ``deepspeed.checkpoint_keep``: its input; attention's output besides, with its
logarithms of sums; the results of all linear layers but the widest besides; those of all; and all that the backward pass asks for, where
nothing is computed again. A test counts them."""

SUBGROUP = 10**9
"""Elements that ZeRO-3 updates at once."""

ENCODER = 4_762_310_656
"""Parameters of T5 v1.1 XXL's encoder, which embeds the validation's prompts before the transformer is loaded."""

VAE = 215_583_907
"""Parameters of CogVideoX's autoencoder."""

DECODING, TILE = 22_900.0, (240, 360)
"""Elements alive for each pixel when the VAE decodes two latent frames after others, and the size in pixels of one tile."""

CONTEXT, FRAGMENTS = 1.5e9, 0.05
"""Bytes that CUDA, NCCL and cuBLAS take, and the share of the rest that lies idle between allocations."""

PROCESS = 3e9
"""Host memory of one process: Python, torch's libraries, what CUDA maps."""

LIVE = 4
"""Gather buckets of parameters that ZeRO-3 may hold whole at once, as cogflow sets it."""


@dataclass(frozen=True)
class Sampling:
    """What a validation makes: clips of ``frames`` pictures, ``passes`` of the transformer at once (2 with guidance)."""

    frames: int
    height: int
    width: int
    passes: int
    vae_bytes: int
    tiled: bool


@dataclass(frozen=True)
class Memory:
    """Bytes by part and by phase; a phase is the parts that are there at the same time."""

    parts: dict[str, float]
    phases: dict[str, float]

    @property
    def peak(self) -> float:
        return max(self.phases.values())

    @property
    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: self.phases[phase])


def gpu(
    shape: TransformerSize, tokens: Tokens, setting: GpuLayout, sampling: Sampling | None, *, encoder: float = ENCODER
) -> Memory:
    """Of each GPU. ``encoder``: parameters of the text encoder; ``sampling``: ``None`` without validations."""
    trained, size, share = shape.trained, setting.bytes, 1 / setting.gpus
    whole = setting.zero_stage < 3
    sharded = share if setting.zero_stage > 0 else 1.0
    half = size < 4
    parts: dict[str, float] = {}
    on_host = setting.offload_parameters
    parts["weights"] = shape.parameters * size * (1.0 if whole else 0.0 if on_host else share)
    live = min(shape.parameters, max(LIVE * setting.gather_bucket, 10**6)) + min(
        shape.parameters, setting.gather_bucket
    )
    parts["weights gathered"] = 0.0 if whole else min(live, shape.parameters) * size
    parts["fp32 master"] = (
        0.0 if setting.offload_optimizer or (setting.zero_stage == 0 and not half) else 4 * trained * sharded
    )
    parts["optimizer states"] = 0.0 if setting.offload_optimizer else 8 * trained * sharded
    parts["gradients"] = _gradients(trained, setting)
    doubled = 2 if setting.overlap and whole and setting.gpus > 1 else 1
    carried = (
        setting.reduced_bytes if setting.reduced_bytes > size and setting.gpus > 1 else 0
    )  # a copy of the bucket that is sent
    parts["buckets"] = setting.reduce_bucket * (size * doubled + carried) if setting.zero_stage > 0 else 0.0
    # What a shared sequence copies for its exchanges lies at attention, where less is alive than at the feed-forward's height.
    hidden = tokens.total / setting.sequence * shape.width * size * setting.batch
    again = setting.recomputed(shape.layers)
    parts["activations"] = hidden * sum(count * KEPT[keep] for keep, count in setting.kept(shape.layers).items())
    parts["temporary peak"] = WORKING * hidden if again else (WORKING - SAVED) * hidden
    parts["optimizer step"] = _step(trained, setting)
    parts["EMA"] = 0.0 if not setting.ema or setting.ema_on_host else 4 * shape.parameters * share
    parts["sampling"] = _sampling(shape, tokens, setting, sampling) if sampling else 0.0
    resident = parts["weights"] + parts["fp32 master"] + parts["optimizer states"] + parts["EMA"]
    phases = {
        "start": max(encoder * size, _start(shape, setting)),
        "forward and backward": resident
        + sum(parts[name] for name in ("weights gathered", "gradients", "buckets", "activations", "temporary peak")),
        "optimizer step": resident + parts["gradients"] + parts["optimizer step"],
    }
    if sampling:
        phases["validation"] = resident + parts["weights gathered"] + parts["sampling"]
    return Memory(parts, {name: bytes + CONTEXT + FRAGMENTS * bytes for name, bytes in phases.items()})


def _gradients(trained: int, setting: GpuLayout) -> float:
    """What stays of the gradients after the backward pass. Without ZeRO half-precision training gathers them in fp32, besides."""
    if setting.zero_stage == 0:
        return trained * (setting.bytes + (4 if setting.bytes < 4 else 0))
    if setting.zero_stage == 1:
        return float(trained * setting.bytes)
    # With offloading each bucket goes to the host as soon as it is reduced.
    return 0.0 if setting.offload_optimizer else trained * setting.bytes / setting.gpus


def _step(trained: int, setting: GpuLayout) -> float:
    """Copy of the gradients that the update makes: one in fp32."""
    if setting.zero_stage == 0 or setting.offload_optimizer:
        return 0.0
    part = trained / setting.gpus
    if setting.zero_stage == 3:
        return 4 * min(SUBGROUP, part)
    return 4 * part


def _start(shape: TransformerSize, setting: GpuLayout) -> float:
    """While DeepSpeed is built: each rank's share under ZeRO-3, else the weights whole, and once more flat in ZeRO-1 and 2."""
    weights = shape.parameters * setting.bytes
    return float(
        2 * weights if setting.zero_stage in (1, 2) else weights / setting.gpus if setting.zero_stage == 3 else weights
    )


def _sampling(shape: TransformerSize, tokens: Tokens, setting: GpuLayout, sampling: Sampling) -> float:
    """The larger of denoising and decoding; the autoencoder is there for both."""
    denoising = INFERENCE * tokens.total * shape.width * setting.bytes * sampling.passes
    return VAE * sampling.vae_bytes + max(denoising, decoding(sampling))


def decoding(sampling: Sampling) -> float:
    """Bytes that decoding one clip needs beside the weights of the autoencoder."""
    pixels = sampling.height * sampling.width
    video = 3 * sampling.frames * pixels * sampling.vae_bytes
    at_once = min(pixels, TILE[0] * TILE[1]) if sampling.tiled else pixels
    return DECODING * at_once * sampling.vae_bytes + video


def host(shape: TransformerSize, setting: GpuLayout, *, validates: bool, encoder: float = ENCODER) -> Memory:
    """Of one machine with ``setting.local`` processes."""
    trained, size, local = shape.trained, setting.bytes, setting.local
    share = local / setting.gpus
    parts: dict[str, float] = {"processes": local * PROCESS}
    parts["optimizer states"] = 12 * trained * share if setting.offload_optimizer else 0.0
    gradients = size + 4 if setting.zero_stage == 3 else 4
    parts["gradients"] = gradients * trained * share if setting.offload_optimizer else 0.0
    # ZeRO-1 and 2 carry the updated weights to the GPU through a buffer of their own.
    parts["weights"] = (
        size * trained * share
        if setting.offload_parameters or (setting.offload_optimizer and setting.zero_stage < 3)
        else 0.0
    )
    parts["EMA"] = 4 * shape.parameters * share if setting.ema and setting.ema_on_host else 0.0
    parts["VAE"] = local * VAE * 4.0 if validates else 0.0
    # One process loads the text encoder for all; the transformer's weights come one by one.
    parts["loading"] = encoder * size
    # The averages take the weights' place at a validation; each process keeps its share of the weights meanwhile.
    parts["weights set aside"] = shape.parameters * size * share if setting.ema and validates else 0.0
    steady = sum(parts[name] for name in ("processes", "optimizer states", "gradients", "weights", "EMA", "VAE"))
    return Memory(
        parts,
        {
            "start": parts["processes"] + parts["VAE"] + parts["loading"],
            "training": steady,
            "validation": steady + parts["weights set aside"],
        },
    )
