"""One training step of the configured model at its real shapes, with drawn weights and clips: time, operations, memory by part.

The loop, the guards, the indicator and the loader run as in stage=train; nothing that is due between steps does. The VAE and T5 are not on
the device while training, so that they are not here.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cogflow.benchmarking.ceiling import Ceiling, ceiling
from cogflow.benchmarking.drawn import DrawnClips, DrawnWeights
from cogflow.benchmarking.overhead import bare_steps
from cogflow.benchmarking.step_profile import Part, profiled
from cogflow.benchmarking.turns import Turn, Turns
from cogflow.config.schema import BenchmarkStage, Config, TrainStage
from cogflow.models import loading, tiny
from cogflow.models.inputs import Inputs
from cogflow.planning import flops, transformer_size
from cogflow.planning.plan import kept, plan
from cogflow.runtime import ranks
from cogflow.training import initial_weights, speed
from cogflow.training.engine import Engine
from cogflow.training.loader import Loader
from cogflow.training.loop import Trainer
from cogflow.training.recomputation import recompute
from cogflow.weights.strict_loading import expected_shapes, meta_model

CLIPS = 4
BARE = "bare"
PHASES = ("forward and backward", "optimizer step")
"""Of a plan's memory, those that a step goes through; with what CUDA takes and what lies idle between allocations."""


@dataclass(frozen=True)
class Speed:
    """Seconds of a step over the turns; ``clips``: a second, on this rank."""

    median: float
    lowest: float
    highest: float
    clips: float


def measure(config: Config[BenchmarkStage], stage: BenchmarkStage, advance: Callable[[int], None]) -> dict[str, Any]:
    """What a step costs here, beside what it could; with ``stage.vs=bare`` beside the loop one writes first, by turns."""
    began = time.perf_counter()
    speed.grow_segments()
    device = ranks.device()
    dtype = loading.resolve_dtype(config.model, device)
    best = ceiling(device, dtype)
    asked = training(config, stage, 1 + (1 + stage.repeats) * stage.steps)
    watch = MemoryWatch(device)
    trainer = make_trainer(asked, device, dtype, watch)
    with Loader(trainer.batch, 1, device) as loader:
        trainer.train_step(0, loader)
    watch.after_start()
    waited: list[float] = []
    other = bare_steps(trainer.engine, trainer, stage.batch_size) if stage.vs == BARE else None
    turns = Turns(stage.steps, device, advance, other)
    started = time.perf_counter() - began
    trainer.run(1, turns.hooks(lambda _, values: waited.append(values["train/data_wait"])))
    memory = watch.found()
    parts = _profiled(trainer, asked, best) if stage.profile else []
    mine, theirs = speed_of(turns.ours[1:], stage.batch_size), speed_of(turns.theirs[1:], stage.batch_size)
    foreseen = plan(asked)
    useful = flops.step(foreseen.shape, foreseen.tokens).total * stage.batch_size
    done = flops.step(foreseen.shape, foreseen.tokens, foreseen.setting.kept(foreseen.shape.layers))
    return {
        "model": config.model.name,
        "parameters": foreseen.shape.parameters,
        "size": f"{config.data.frames}x{config.data.height}x{config.data.width}",
        "tokens": foreseen.tokens.total,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "dtype": loading.dtype_name(dtype),
        "world": ranks.world_size(),
        "seconds": asdict(mine) if mine else None,
        "turns": [turn.wall for turn in turns.ours],
        "allocator retries": torch.cuda.memory_stats(device)["num_alloc_retries"] if device.type == "cuda" else 0,
        "bare": asdict(theirs) if theirs else None,
        "ratio to bare": mine.median / theirs.median if mine and theirs else None,
        "flops": {
            "useful": useful,
            "with recomputation": done.total * stage.batch_size,
            "counted": counted_flops(config),
        },
        "ceiling": asdict(best),
        "mfu": useful / mine.median / best.flops if mine else None,
        "hfu": done.total * stage.batch_size / mine.median / best.flops if mine else None,
        "data wait": median(waited) / mine.median if waited and mine else None,
        "memory": memory
        | {
            "foreseen": {part: size / 1e9 for part, size in foreseen.gpu.parts.items()},
            "foreseen peak": max(foreseen.gpu.phases[phase] for phase in PHASES) / 1e9,
        },
        "start seconds": started,
        "profile": [asdict(part) for part in parts],
    }


def training(config: Config[BenchmarkStage], stage: BenchmarkStage, steps: int) -> Config[TrainStage]:
    """``config`` with settings of a training of so many steps, between which nothing is due."""
    train = TrainStage(
        steps=steps,
        batch_size=stage.batch_size,
        sample_every=0,
        evaluate_every=0,
        save_every=0,
        warmup_steps=0,
        learning_rate=1e-6,
    )
    return config.with_stage(train)


def make_trainer(config: Config[TrainStage], device: torch.device, dtype: torch.dtype, watch: MemoryWatch) -> Trainer:
    """A trainer as stage=train has it, without anything from a disk."""
    stage = config.stage
    shape_of, source = transformer_size.config_of(config.model)
    weights = DrawnWeights(expected_shapes(meta_model(shape_of, Path(source))), device)
    transformer = initial_weights.make(shape_of, weights, config.deepspeed, stage, dtype, device)
    watch.after_weights()
    recompute(transformer, config.deepspeed, kept(config), speed.mode(speed.how_compiled(config, device)))
    speed.prepare(transformer, config, device, dtype)
    engine = Engine(transformer.train(), config.deepspeed, stage, dtype)
    data, own = config.data, transformer.config
    latents = ((data.frames - 1) // own.temporal_compression_ratio + 1, data.height // 8, data.width // 8)
    clips: Any = DrawnClips(CLIPS, latents, own.max_text_seq_length, own.text_embed_dim)
    alphas = loading.load_scheduler(tiny.folder()).alphas_cumprod
    inputs = Inputs.of(own, {"scaling_factor": 0.7})
    trainer = Trainer(config, engine, None, clips, alphas, inputs, device, dtype)
    watch.follow(transformer)
    return trainer


def speed_of(turns: list[Turn], batch_size: int) -> Speed | None:
    """Over ``turns``; ``None`` without any."""
    if not turns:
        return None
    walls = sorted(turn.wall for turn in turns)
    return Speed(median(walls), walls[0], walls[-1], batch_size / median(walls))


def _profiled(trainer: Trainer, config: Config[TrainStage], best: Ceiling) -> list[Part]:
    """One more step, by what its time goes to."""
    foreseen, steps = plan(config), trainer.stage.steps
    with Loader(trainer.batch, 1, trainer.device) as loader:
        trainer.train_step(steps, loader)  # its batch is made, and the next one's, too
        return profiled(
            lambda: trainer.train_step(steps + 1, loader), trainer.device, foreseen.forward, trainer.stage.batch_size, best
        )  # fmt: skip


def counted_flops(config: Config[BenchmarkStage]) -> float:
    """Operations of one clip's forward and backward pass as torch counts them, on the meta device; nothing is computed twice."""
    described, source = transformer_size.config_of(config.model)
    data = config.data
    with torch.device("meta"):
        transformer = meta_model(described, Path(source)).to("meta").train()
        own = transformer.config
        frames = (data.frames - 1) // own.temporal_compression_ratio + 1
        padded = frames + frames % (own.patch_size_t or 1)
        x_t = torch.empty(1, padded, own.in_channels, data.height // 8, data.width // 8)
        embeds, timestep = torch.empty(1, own.max_text_seq_length, own.text_embed_dim), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            transformer(x_t, embeds, timestep, return_dict=False)[0].sum().backward()
    return float(counter.get_total_flops())


class MemoryWatch:
    """Memory at the points where it changes, in bytes: of a GPU what PyTorch has allocated, else what the process holds."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._points, self._activations = device, dict[str, int](), 0
        self._before = self._now()

    def after_weights(self) -> None:
        self._points["weights"] = self._now() - self._before

    def after_start(self) -> None:
        """After the first step: weights, masters, states and buckets lie there; peaks count from here."""
        self._points["resident"] = self._now() - self._before
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def follow(self, transformer: torch.nn.Module) -> None:
        """Have the activations be looked at: what a forward pass leaves."""
        before = [0]

        def entering(*_: Any) -> None:
            before[0] = self._now()

        def leaving(*_: Any) -> None:
            self._activations = max(self._activations, self._now() - before[0])

        transformer.register_forward_pre_hook(entering)
        transformer.register_forward_hook(leaving)

    def found(self) -> dict[str, float]:
        """GB by part."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
        else:
            peak = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = self._points | {"activations": self._activations, "peak": peak, "reserved": reserved}
        return {name: value / 1e9 for name, value in found.items()}

    def _now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        fields = Path("/proc/self/status").read_text().split("RssAnon:")
        return int(fields[1].split()[0]) * 1024 if len(fields) > 1 else 0
