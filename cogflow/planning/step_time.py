"""Forecast what one optimizer step sends between GPUs and hosts, by ZeRO stage, and how many seconds it takes."""

from __future__ import annotations

from dataclasses import dataclass

from cogflow.training import flops, gpu_memory
from cogflow.training.gpu_layout import GpuLayout
from cogflow.training.transformer_size import Tokens, TransformerSize

INSIDE, BETWEEN, TO_HOST = 300e9, 40e9, 25e9
"""Bytes per second that a GPU reaches: to GPUs of its machine (NVLink of an H100 or H200), to other machines (a 400
Gb/s card for each GPU) and to the host (PCIe 5, shared by two). Other machines have other speeds; the volumes are the
same."""

EXCHANGES = 4
"""Hidden states that each block exchanges in its forward pass between the GPUs that share a sequence: queries, keys,
values and results. The backward pass and the recomputation exchange as many each."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in one step. ``seconds``: their time at ``INSIDE``, ``BETWEEN`` and ``TO_HOST`` without
    overlap. ``tokens``: bytes that GPUs which share a sequence exchange around attention."""

    gradients: float
    weights: float
    averages: float
    host: float
    seconds: float
    tokens: float = 0.0

    @property
    def between_gpus(self) -> float:
        return self.gradients + self.weights + self.averages + self.tokens


def traffic(shape: TransformerSize, tokens: Tokens, layout: GpuLayout) -> Traffic:
    """Return the bytes that one GPU sends in one step.

    In a ring, a reduce-scatter or an all-gather of M bytes sends M (N - 1) / N from each of N GPUs, an all-reduce twice
    that. An all-to-all sends the share (N - 1) / N of the GPU's own bytes.
    """
    around = (layout.gpus - 1) / layout.gpus
    weights = shape.parameters * layout.bytes * around
    gradients = shape.trained * layout.reduced_bytes * around
    micro = layout.accumulation
    # ZeRO-1 and 2 all-reduce each bucket, and each rank keeps its part (use_multi_rank_bucket_allreduce, DeepSpeed's
    # default).
    reduced = {0: 2 * gradients, 1: 2 * gradients, 2: 2 * micro * gradients, 3: micro * gradients}[layout.zero_stage]
    # ZeRO-3 gathers the weights for the forward pass, and again for the backward pass those that it has released.
    # Recomputation uses the weights that are gathered for the backward pass.
    fetched = micro * (2 * weights - kept(shape, layout) * layout.bytes * around)
    gathered = {0: 0.0, 1: weights, 2: weights, 3: fetched}[layout.zero_stage]
    averages = weights / layout.ema_every if layout.ema and layout.zero_stage == 3 else 0.0
    host = 4 * shape.trained / layout.gpus / layout.ema_every if layout.ema and layout.ema_on_host else 0.0
    if layout.offload_optimizer:
        host += (micro + 1) * shape.trained * layout.bytes / layout.gpus
    if layout.offload_parameters:
        host += 2 * micro * shape.parameters * layout.bytes / layout.gpus
    own = tokens.total / layout.sequence * layout.batch * shape.width * layout.bytes
    passes = 2 * shape.layers + layout.recomputed(shape.layers)
    exchanged = micro * passes * EXCHANGES * own * (layout.sequence - 1) / layout.sequence
    seconds = (reduced + gathered + averages) / speed(layout) + exchanged / exchange_speed(layout) + host / TO_HOST
    return Traffic(reduced, gathered, averages, host, seconds, exchanged)


def kept(shape: TransformerSize, layout: GpuLayout) -> float:
    """Return the number of elements that ZeRO-3 still holds in the backward pass from the forward pass.

    These are the last elements of the forward pass: as many as it may hold at once, since it prefetches that many and
    releases none of them, or those that it uses again within ``layout.reuse`` elements, where these are more. A weight
    with d elements behind it is used again after 2 d elements, with recomputation after 3 d.
    """
    passes = 2 + layout.recomputed(shape.layers) / shape.layers
    return min(float(shape.parameters), max(layout.reuse / passes, gpu_memory.LIVE * layout.gather_bucket, 10**6))


def speed(layout: GpuLayout) -> float:
    """Return the bytes per second of the slowest link in the ring of GPUs."""
    return BETWEEN if layout.nodes > 1 else INSIDE


def exchange_speed(layout: GpuLayout) -> float:
    """Return the bytes per second between GPUs that share a sequence. They have consecutive ranks, and are on one
    machine if whole groups fit on it."""
    return INSIDE if layout.local % layout.sequence == 0 else BETWEEN


def exposed(sent: Traffic, layout: GpuLayout, *, backward: float, compute: float) -> float:
    """Return the seconds of a step that wait for communication.

    Gradients are reduced during the last backward pass (``overlap_comm``), and ZeRO-3 prefetches weights. Gathering
    after the update, transfers to the host and the exchanges of attention are not hidden.
    """
    reducing = sent.gradients / speed(layout)
    gathering = sent.weights / speed(layout)
    hidden = backward if layout.overlap else 0.0
    after = sent.averages / speed(layout) + sent.host / TO_HOST + sent.tokens / exchange_speed(layout)
    if layout.zero_stage == 3:
        return max(0.0, reducing + gathering - compute) + after
    return max(0.0, reducing - hidden) + gathering + after


@dataclass(frozen=True)
class Pace:
    """Seconds of one step. ``waiting``: seconds of communication that computation does not hide."""

    compute: float
    waiting: float

    @property
    def step(self) -> float:
        return self.compute + self.waiting


def pace(shape: TransformerSize, tokens: Tokens, layout: GpuLayout, tflops: float) -> Pace:
    """Return the seconds of a step with ``layout`` on GPUs that reach ``tflops`` TFLOP/s."""
    one = flops.step(shape, tokens, layout.kept(shape.layers))
    clips = layout.batch * layout.accumulation / layout.sequence
    # ZeRO-2 reduces gradients in the backward pass of each micro step, ZeRO-0 and 1 only in the last one.
    behind = clips if layout.zero_stage >= 2 else clips / layout.accumulation
    compute = one.total * clips / (tflops * 1e12)
    backward = (one.backward + one.recomputation) * behind / (tflops * 1e12)
    return Pace(compute, exposed(traffic(shape, tokens, layout), layout, backward=backward, compute=compute))
