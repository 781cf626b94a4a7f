"""Measure time, operations and memory of one training step of the configured model, with random weights and clips.

The loop, its checks, the step monitor and the loader run as in stage=train. Nothing else runs between steps. The VAE
and T5 are not on the device while training, so this module does not load them.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cogflow.benchmarking.device_peak import DevicePeak, measure_device_peak
from cogflow.benchmarking.random_model import RandomClips, RandomWeights
from cogflow.benchmarking.step_profile import ProfilePart, profile_step
from cogflow.benchmarking.timed_turns import DataWaits, StepTimes, TimedTurns, step_times
from cogflow.config.benchmark_settings import BenchmarkStage
from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.models import loading, tiny
from cogflow.models.transformer_inputs import TransformerInputs
from cogflow.planning.plan import Plan, plan
from cogflow.runtime import ranks
from cogflow.training import flops, initial_weights, speed, transformer_size
from cogflow.training.activation_memory import kept_activations
from cogflow.training.batch import Loader
from cogflow.training.engine import Engine
from cogflow.training.loop import Trainer
from cogflow.training.objective import Objective
from cogflow.training.recomputation import recompute
from cogflow.training.sequence import RankPlacement
from cogflow.training.setup import build_step_trainer
from cogflow.weights.strict_loading import expected_shapes, meta_model

CLIPS = 4
STEP_PHASES = ("forward and backward", "optimizer step")
"""Phases of a plan's memory that a step consists of."""

OtherLoop = Callable[[Trainer, int], Iterator[None]]
"""(trainer, batch size) -> a loop that does one step of the same engine per iteration. It is timed in turns with the
trainer's loop."""


@dataclass(frozen=True)
class StepCost:
    """Cost of one training step. Times in seconds, memory in GB, operations for all clips of the step.

    ``flops``: "useful", "with_recomputation", and "counted" (one clip, counted by torch). ``mfu`` and ``hfu``: useful
    and executed operations per second, divided by ``device_peak.flops``. ``data_wait``: share of the step that waits
    for a batch. ``memory``: see :class:`MemoryLog`. ``memory_planned``: the plan's forecast of the parts and the peak.
    ``other``: times of the loop in comparison. ``ratio_to_other``: median time divided by that of ``other``. Fields
    with a default are unknown for the steps of other trainers.
    """

    model: str
    parameters: int
    size: str
    tokens: int
    dtype: str
    device_peak: DevicePeak
    times: StepTimes | None
    mfu: float | None
    memory: dict[str, float]
    device: str = ""
    world: int = 1
    turns: list[float] = field(default_factory=list)
    start_seconds: float | None = None
    flops: dict[str, float] = field(default_factory=dict)
    hfu: float | None = None
    data_wait: float | None = None
    memory_planned: dict[str, float] = field(default_factory=dict)
    allocator_retries: int = 0
    profile: list[ProfilePart] = field(default_factory=list)
    other: StepTimes | None = None
    ratio_to_other: float | None = None


def measure_step(
    config: Config[BenchmarkStage], advance: Callable[[int], None], other: OtherLoop | None = None
) -> StepCost:
    """Train ``stage.repeats`` turns of ``stage.steps`` steps after one warm-up turn, and return the cost. Collective.

    ``other``: a loop to time in turns with the trainer's. ``advance`` is called with 1 after each turn.
    """
    stage = config.stage
    began = time.perf_counter()
    speed.grow_segments()
    device = ranks.device()
    dtype = loading.resolve_dtype(config.model, device)
    peak = measure_device_peak(device, dtype)
    asked = train_config(config, 1 + (1 + stage.repeats) * stage.steps)
    memory_log = MemoryLog(device)
    trainer = make_trainer(asked, device, dtype, memory_log)
    with Loader(trainer.batches.batch, 1, device) as loader:
        trainer.train_step(0, loader)
    memory_log.after_first_step()
    waits = DataWaits()
    trainer.context.tracker = waits
    trainer.context.step = 1
    turns = TimedTurns(stage.steps, device, advance, other(trainer, stage.batch_size) if other else None)
    start_seconds = time.perf_counter() - began
    trainer.callbacks.items.append(turns)
    trainer.run()
    memory = memory_log.gigabytes()
    profile = _profile(trainer, asked, peak) if stage.profile else []
    times = step_times(turns.ours[1:], stage.batch_size)
    other_times = step_times(turns.theirs[1:], stage.batch_size)
    planned = plan(asked)
    operations = _operations(config, planned)
    per_second = peak.flops * times.median if times else None
    return StepCost(
        model=config.model.name,
        parameters=planned.shape.parameters,
        size=f"{config.data.frames}x{config.data.height}x{config.data.width}",
        tokens=planned.tokens.total,
        device=device_name(device),
        dtype=loading.dtype_name(dtype),
        world=ranks.world_size(),
        device_peak=peak,
        times=times,
        turns=[turn.wall for turn in turns.ours],
        start_seconds=start_seconds,
        flops=operations,
        mfu=operations["useful"] / per_second if per_second else None,
        hfu=operations["with_recomputation"] / per_second if per_second else None,
        data_wait=median(waits.seconds) / times.median if waits.seconds and times else None,
        memory=memory,
        memory_planned={part: size / 1e9 for part, size in planned.gpu.parts.items()}
        | {"peak": max(planned.gpu.phases[phase] for phase in STEP_PHASES) / 1e9},
        allocator_retries=torch.cuda.memory_stats(device)["num_alloc_retries"] if device.type == "cuda" else 0,
        profile=profile,
        other=other_times,
        ratio_to_other=times.median / other_times.median if times and other_times else None,
    )


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or ``cpu`` with its number of threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu, {torch.get_num_threads()} threads"


def train_config(config: Config[BenchmarkStage], steps: int) -> Config[TrainStage]:
    """Return ``config`` with the settings of a training of ``steps`` steps that neither samples nor evaluates nor
    saves."""
    train = TrainStage(
        steps=steps,
        batch_size=config.stage.batch_size,
        sample_every=0,
        evaluate_every=0,
        save_every=0,
        warmup_steps=0,
        learning_rate=1e-6,
    )
    return config.with_stage(train)


def make_trainer(
    config: Config[TrainStage], device: torch.device, dtype: torch.dtype, memory_log: MemoryLog
) -> Trainer:
    """Return a trainer as stage=train builds it, with random weights and clips instead of files."""
    stage = config.stage
    described = transformer_size.description_of(config.model)
    weights = RandomWeights(expected_shapes(meta_model(described.config, described.source)), device)
    transformer = initial_weights.make(described.config, weights, config.deepspeed, stage, dtype, device)
    memory_log.after_weights()
    recompute(
        transformer, config.deepspeed, kept_activations(config), speed.compile_mode(speed.how_compiled(config, device))
    )
    speed.prepare(transformer, config, device, dtype)
    engine = Engine(transformer.train(), config.deepspeed, stage, dtype)
    data, own = config.data, transformer.config
    latents = ((data.frames - 1) // own.temporal_compression_ratio + 1, data.height // 8, data.width // 8)
    clips: Any = RandomClips(CLIPS, latents, own.max_text_seq_length, own.text_embed_dim)
    alphas = loading.load_scheduler(tiny.folder()).alphas_cumprod
    inputs = TransformerInputs.of(described.settings, scaling_factor=0.7)
    placement = RankPlacement(config.parallel.sequence)
    objective = Objective(engine, alphas, inputs, placement, device=device, dtype=dtype)
    trainer = build_step_trainer(config, clips, objective)
    memory_log.follow(transformer)
    return trainer


def _profile(trainer: Trainer, config: Config[TrainStage], peak: DevicePeak) -> list[ProfilePart]:
    """Train one step without the profiler, which prefetches the next batch, and one step under it. Return the
    profile.
    """
    steps = trainer.stage.steps
    with Loader(trainer.batches.batch, 1, trainer.device) as loader:
        trainer.train_step(steps, loader)
        return profile_step(
            lambda: trainer.train_step(steps + 1, loader),
            trainer.device,
            forward=plan(config).forward,
            clips=trainer.stage.batch_size,
            peak=peak,
        )


def _operations(config: Config[BenchmarkStage], planned: Plan) -> dict[str, float]:
    batch_size = config.stage.batch_size
    useful = flops.step(planned.shape, planned.tokens)
    executed = flops.step(planned.shape, planned.tokens, planned.layout.kept(planned.shape.layers))
    return {
        "useful": useful.total * batch_size,
        "with_recomputation": executed.total * batch_size,
        "counted": counted_flops(config),
    }


def counted_flops(config: Config[BenchmarkStage]) -> float:
    """Return the operations of one clip's forward and backward pass as torch counts them on the meta device, without
    recomputation."""
    described = transformer_size.description_of(config.model)
    data = config.data
    with torch.device("meta"):
        transformer = meta_model(described.config, described.source).to("meta").train()
        own: Any = transformer.config
        frames = (data.frames - 1) // own.temporal_compression_ratio + 1
        padded = frames + frames % (own.patch_size_t or 1)
        x_t = torch.empty(1, padded, own.in_channels, data.height // 8, data.width // 8)
        embeds, timestep = torch.empty(1, own.max_text_seq_length, own.text_embed_dim), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            transformer(x_t, embeds, timestep, return_dict=False)[0].sum().backward()
    return float(counter.get_total_flops())


class MemoryLog:
    """Memory in bytes at several points: on a GPU the bytes that PyTorch has allocated, else RssAnon of the process.

    ``weights``: after the model is made. ``resident``: after the first step, with masters, optimizer states and
    buckets. ``activations``: growth during a forward pass. ``peak`` and ``reserved``: highest values since the first
    step (on a CPU: since the process began).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._points: dict[str, int] = {}
        self._activations = 0
        self._before = self._now()

    def after_weights(self) -> None:
        self._points["weights"] = self._now() - self._before

    def after_first_step(self) -> None:
        self._points["resident"] = self._now() - self._before
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def follow(self, transformer: torch.nn.Module) -> None:
        """Measure the memory that each forward pass of ``transformer`` leaves allocated."""
        before = [0]

        def entering(*_: Any) -> None:
            before[0] = self._now()

        def leaving(*_: Any) -> None:
            self._activations = max(self._activations, self._now() - before[0])

        transformer.register_forward_pre_hook(entering)
        transformer.register_forward_hook(leaving)

    def gigabytes(self) -> dict[str, float]:
        """Return all values in GB (10^9 bytes)."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
        else:
            peak = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        values = self._points | {"activations": self._activations, "peak": peak, "reserved": reserved}
        return {name: value / 1e9 for name, value in values.items()}

    def _now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        fields = Path("/proc/self/status").read_text().split("RssAnon:")
        return int(fields[1].split()[0]) * 1024 if len(fields) > 1 else 0
