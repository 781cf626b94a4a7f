"""Forecast what one optimizer step sends between GPUs and hosts, by ZeRO stage, and how many seconds it takes."""

from __future__ import annotations

from dataclasses import dataclass

from cogflow.training import flops, gpu_memory
from cogflow.training.gpu_layout import GpuLayout
from cogflow.training.transformer_size import Tokens, TransformerSize

INSIDE, BETWEEN, TO_HOST = 300e9, 40e9, 25e9
"""Bytes per second that a GPU reaches: to others of its machine (NVLink of an H100 or H200), to other machines (a 400
Gb/s card for each GPU) and to the host (PCIe 5, shared by two). Another machine has other figures; the volumes
stay."""


EXCHANGES = 4
"""Hidden states that each block sends over the GPUs that share a sequence in its forward pass (queries, keys, values,
results); backwards and in recomputation as many."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one GPU at one step. ``seconds`` is for ``INSIDE``, ``BETWEEN`` and ``TO_HOST``, with nothing
    overlapped. ``tokens``: what GPUs that share a sequence exchange around attention."""

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
    """Return the bytes that one GPU sends at one step.

    Rings: reducing or gathering M bytes sends M (N - 1) / N from each of N GPUs, an all-reduce twice that. An
    all-to-all sends the same share of the GPU's own bytes."""
    around = (layout.gpus - 1) / layout.gpus
    weights = shape.parameters * layout.bytes * around
    gradients = shape.trained * layout.reduced_bytes * around
    micro = layout.accumulation
    # ZeRO-1 and 2 all-reduce each bucket, of which every rank keeps its part (use_multi_rank_bucket_allreduce,
    # DeepSpeed's default).
    reduced = {0: 2 * gradients, 1: 2 * gradients, 2: 2 * micro * gradients, 3: micro * gradients}[layout.zero_stage]
    # ZeRO-3 gathers for the forward and, what it does not hold any more, for the backward pass; recomputation finds
    # the weights that the backward pass needs.
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
    """Elements that ZeRO-3 has gathered for the forward pass and still holds for the backward pass: the last ones, as
    many as it may hold at once, since it fetches ahead so far and drops nothing that it came upon; or those that it
    uses again within ``layout.reuse`` elements, where these are more. A weight with d elements behind it is used
    again after 2 d, with recomputation after 3 d."""
    passes = 2 + layout.recomputed(shape.layers) / shape.layers
    return min(float(shape.parameters), max(layout.reuse / passes, gpu_memory.LIVE * layout.gather_bucket, 10**6))


def speed(layout: GpuLayout) -> float:
    """Return the bytes per second from each GPU to the next of its ring: those of the slowest link."""
    return BETWEEN if layout.nodes > 1 else INSIDE


def exchange_speed(layout: GpuLayout) -> float:
    """Return the bytes per second between GPUs that share a sequence. They are neighbours, on one machine if whole
    groups fit on it."""
    return INSIDE if layout.local % layout.sequence == 0 else BETWEEN


def exposed(sent: Traffic, layout: GpuLayout, *, backward: float, compute: float) -> float:
    """Return the seconds of a step that wait for communication. Gradients are reduced while the last backward pass
    goes on (``overlap_comm``), and ZeRO-3 fetches weights ahead; what is gathered after the update, what goes to the
    host and the exchanges of attention are not hidden."""
    reducing = sent.gradients / speed(layout)
    gathering = sent.weights / speed(layout)
    hidden = backward if layout.overlap else 0.0
    after = sent.averages / speed(layout) + sent.host / TO_HOST + sent.tokens / exchange_speed(layout)
    if layout.zero_stage == 3:
        return max(0.0, reducing + gathering - compute) + after
    return max(0.0, reducing - hidden) + gathering + after


@dataclass(frozen=True)
class Pace:
    """Seconds of one step. ``waiting``: of communication that computation does not hide."""

    compute: float
    waiting: float

    @property
    def step(self) -> float:
        return self.compute + self.waiting


def pace(shape: TransformerSize, tokens: Tokens, layout: GpuLayout, tflops: float) -> Pace:
    """Return the seconds of a step of ``layout`` on GPUs that reach ``tflops`` TFLOP/s."""
    one = flops.step(shape, tokens, layout.kept(shape.layers))
    clips = layout.batch * layout.accumulation / layout.sequence
    # ZeRO-2 reduces in the backward pass of each micro step, ZeRO-0 and 1 in that of the last.
    behind = clips if layout.zero_stage >= 2 else clips / layout.accumulation
    compute = one.total * clips / (tflops * 1e12)
    backward = (one.backward + one.recomputation) * behind / (tflops * 1e12)
    return Pace(compute, exposed(traffic(shape, tokens, layout), layout, backward=backward, compute=compute))
