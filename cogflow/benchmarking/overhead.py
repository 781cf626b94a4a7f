"""What cogflow's step costs beside a bare DeepSpeed loop: the same engine, the same clips, in turns.

The bare loop is what one writes first: noise, forward, mean squared error of the velocity, ``engine.backward``, ``engine.step``, from
batches that lie ready on the device; it logs nothing, checks nothing and reads nothing. Cogflow's is :meth:`Trainer.run` as stage=train
runs it: it makes its batches, guards, follows the indicator, and writes every step to metrics.jsonl and W&B (offline).

Beside the wall clock stands the time of all cores, threads that make batches included: on a machine that others use it is the steadier
one, with one thread a process (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

from cogflow.benchmarking.drawn import DrawnClips
from cogflow.benchmarking.turns import Turns
from cogflow.config.schema import BenchmarkStage, Config, DeepSpeedConfig, TrainStage
from cogflow.models import loading, tiny
from cogflow.models.inputs import Inputs
from cogflow.models.rotary import rotary_tables
from cogflow.runtime import ranks
from cogflow.tracking.tracker import Tracker
from cogflow.training.batch import Batch, training_batch
from cogflow.training.engine import Engine
from cogflow.training.loop import Trainer
from cogflow.training.objective import noised, velocity_loss

CLIPS = 16
LATENTS = (3, 8, 12)
"""Latent frames, rows and columns of 9x64x96."""
WARM_UP = 2
"""Turns of each loop that do not count."""


@dataclass(frozen=True)
class Size:
    """A model to train: its heads of 64 (``None``: the shipped tiny one) and layers, and the clips of a step and steps of a turn."""

    name: str
    heads: int | None
    layers: int
    batch_size: int
    turn: int


SIZES = (Size("tiny", None, 5, 4, 4), Size("wide", 12, 8, 1, 1))


def compare(
    config: Config[BenchmarkStage], stage: BenchmarkStage, tracker: Tracker, advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    """One row a size: median seconds of a step of each loop, the median ratio of neighbouring turns, and the loader's share."""
    return [_compare(config, size, max(3, stage.repeats), tracker, advance) for size in SIZES]


def _compare(
    config: Config[BenchmarkStage], size: Size, repeats: int, tracker: Tracker, advance: Callable[[int], None]
) -> dict[str, Any]:
    device = ranks.device()
    steps = (WARM_UP + repeats) * size.turn
    train = TrainStage(
        steps=steps, batch_size=size.batch_size, sample_every=0, evaluate_every=0, save_every=0, warmup_steps=0
    )
    dtype = loading.resolve_dtype(config.model, device)
    transformer = _transformer(size).to(device, dtype).train()
    engine = Engine(transformer, DeepSpeedConfig(zero_stage=config.deepspeed.zero_stage), train, dtype)
    clips: Any = DrawnClips(CLIPS, LATENTS, transformer.config.max_text_seq_length, transformer.config.text_embed_dim)
    alphas = loading.load_scheduler(tiny.folder()).alphas_cumprod
    trainer = Trainer(config.with_stage(train), engine, None, clips, alphas, Inputs(scaling_factor=0.7), device, dtype)
    waited: list[float] = []

    def log(done: int, values: dict[str, float]) -> None:
        waited.append(values["train/data_wait"])
        tracker.log(done, values)

    turns = Turns(size.turn, device, advance, bare_steps(engine, trainer, size.batch_size))
    trainer.run(0, turns.hooks(log))
    ours, theirs = turns.ours[WARM_UP:], turns.theirs[WARM_UP:]
    # Each of cogflow's turns against the bare ones before and after it: a machine that grows slower or faster favours none.
    sides = list(zip(ours, turns.theirs[WARM_UP - 1 :], theirs, strict=False))
    ratios = sorted(2 * mine.wall / (before.wall + after.wall) for mine, before, after in sides)
    return {
        "model": size.name,
        "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
        "cogflow": median(one.wall for one in ours),
        "bare DeepSpeed": median(one.wall for one in theirs),
        "ratio": median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "ratio of core time": median(2 * mine.cores / (before.cores + after.cores) for mine, before, after in sides),
        "data wait": median(waited) / median(one.wall for one in ours),
        "turns": len(ours),
    }


def _transformer(size: Size) -> CogVideoXTransformer3DModel:
    if size.heads is None:
        return loading.load_transformer(tiny.folder(), torch.float32)
    shape = {
        **tiny.new_transformer().config,
        "num_attention_heads": size.heads,
        "attention_head_dim": 64,
        "num_layers": size.layers,
    }
    return CogVideoXTransformer3DModel.from_config(
        {name: value for name, value in shape.items() if not name.startswith("_")}
    )


def bare_steps(engine: Engine, trainer: Trainer, batch_size: int) -> Iterator[None]:
    """The bare loop, a step for each value."""
    alphas, dtype = trainer.alphas_cumprod, trainer.dtype
    batches = [_ready(trainer, number, batch_size) for number in range(max(1, len(trainer.cache.train) // batch_size))]
    frames, _, rows, columns = batches[0].latents.shape[1:]
    tables = rotary_tables(engine.module, frames, rows, columns, device=trainer.device)
    for batch in itertools.cycle(batches):
        x_t = noised(batch.latents, batch.noise, alphas, batch.timesteps)
        v = engine.engine(
            hidden_states=batch.seen(x_t).to(dtype), encoder_hidden_states=batch.embeds.to(dtype), timestep=batch.timesteps,
            image_rotary_emb=tables, return_dict=False, **trainer.inputs.extra(trainer.device, dtype),
        )[0]  # fmt: skip
        engine.engine.backward(velocity_loss(v, batch.latents, x_t, alphas, batch.timesteps).mean)
        engine.engine.step()
        yield


def _ready(trainer: Trainer, number: int, batch_size: int) -> Batch:
    chosen = [place % len(trainer.cache.train) for place in range(number * batch_size, (number + 1) * batch_size)]
    return training_batch(trainer.cache, chosen, (0, number), 0, inputs=trainer.inputs, text_dropout=0.1).to(
        trainer.device
    )


def told(row: dict[str, Any]) -> str:
    """A row in words."""
    more = f"{row['ratio'] - 1:+.1%} beside bare DeepSpeed ({row['ratio of core time'] - 1:+.1%} of core time)"
    return f"{row['model']}: {1000 * row['cogflow']:.0f} ms a step, {more}"
