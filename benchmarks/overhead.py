"""Compare cogflow's training step with a bare DeepSpeed loop on the same engine and clips, in turns: ``python -m
benchmarks.overhead``.

The bare loop computes noise, forward pass, mean squared error of the velocity, ``engine.backward`` and ``engine.step``
on batches that are already on the device. It logs, checks and reads nothing. Cogflow's loop is :meth:`Trainer.run` as
stage=train runs it: it makes batches, checks them, computes the indicator, and writes every step to metrics.jsonl and
W&B (offline).

The benchmark also reports the CPU time of all threads, including those that make batches. On a shared machine it varies
less than the wall time, with one thread per process (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, cast

import torch
from diffusers import CogVideoXTransformer3DModel

from benchmarks.output import new_parser, report
from cogflow.benchmarking.random_model import RandomClips
from cogflow.benchmarking.results import BenchmarkResult
from cogflow.benchmarking.step import measure_step
from cogflow.benchmarking.step_settings import AS_CONFIGURED, COLUMNS, SettingResult, row, summary_line
from cogflow.benchmarking.timed_turns import DataWaits, TimedTurns
from cogflow.config.benchmark_settings import BenchmarkStage
from cogflow.config.compose import compose
from cogflow.config.config import Config
from cogflow.config.deepspeed_section import DeepSpeedConfig
from cogflow.config.train_settings import TrainStage
from cogflow.files.paths import run_folder
from cogflow.models import loading, tiny
from cogflow.models.transformer_inputs import TransformerInputs, rotary_tables
from cogflow.runtime import ranks
from cogflow.runtime.progress import progress
from cogflow.tracking.tracker import Tracker, open_tracker
from cogflow.training.batch import Batch, training_batch
from cogflow.training.engine import Engine
from cogflow.training.loop import Trainer
from cogflow.training.objective import Objective, noised, velocity_loss
from cogflow.training.sequence import RankPlacement
from cogflow.training.setup import build_step_trainer

CLIPS = 16
LATENTS = (3, 8, 12)
"""Latent frames, rows and columns of 9x64x96."""
WARM_UP = 2
"""Number of warm-up turns of each loop."""


@dataclass(frozen=True)
class Size:
    """A model to train.

    ``heads``: heads of 64 channels, ``None`` for the shipped tiny model. ``turn``: steps of a turn.
    """

    name: str
    heads: int | None
    layers: int
    batch_size: int
    turn: int


SIZES = (Size("tiny", None, 5, 4, 4), Size("wide", 12, 8, 1, 1))


@dataclass(frozen=True)
class Overhead:
    """Median seconds of a step of each loop, and ratios of cogflow's turns to the bare turns before and after them."""

    model: str
    parameters: int
    cogflow: float
    bare: float
    ratio: float
    lowest: float
    highest: float
    ratio_of_cpu_time: float
    data_wait: float
    turns: int


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command line ``words`` (default: ``sys.argv``)."""
    parser = new_parser("overhead", __doc__)
    parser.add_argument("--repeats", type=int, default=3, help="number of timed turns, 3 or more; default: %(default)s")
    parser.add_argument(
        "--configured", action="store_true", help="run the configured model instead of the tiny and the wide model"
    )
    parser.add_argument("settings", nargs="*", help="settings of cogflow, such as tracking.log_every=10")
    given = parser.parse_args(words)
    repeats = max(3, given.repeats)
    config = benchmark_config(["run.name=overhead", f"stage.repeats={repeats}", *given.settings])
    if given.configured:
        report(compare_configured(config), given.output)
        return
    with (
        open_tracker(config, "benchmark", run_folder(config.run)) as tracker,
        progress(len(SIZES) * (repeats + WARM_UP), "turns") as bar,
    ):
        found = [compare_size(config, size, repeats, tracker, bar.advance) for size in SIZES]
    rows = [asdict(overhead) for overhead in found]
    result = BenchmarkResult(
        summary="overhead: " + "; ".join(format_overhead(overhead) for overhead in found),
        columns=list(rows[0]),
        rows=[list(values.values()) for values in rows],
        details={"rows": rows},
    )
    report(result, given.output)


def benchmark_config(settings: Sequence[str]) -> Config[BenchmarkStage]:
    """Return the config of stage=benchmark with ``settings``, of the tiny model unless they name another model."""
    model = [] if any(setting.startswith("model=") for setting in settings) else ["model=tiny"]
    return cast("Config[BenchmarkStage]", compose(["stage=benchmark", *model, *settings]))


def compare_configured(config: Config[BenchmarkStage]) -> BenchmarkResult:
    """Measure a step of the configured model with the bare loop in turns. Works under torchrun, too."""
    ranks.setup()
    with progress(1 + config.stage.repeats, "turns") as bar:
        cost = measure_step(config, bar.advance, other=lambda trainer, size: bare_steps(trainer.engine, trainer, size))
    return BenchmarkResult(
        summary=f"overhead: {summary_line(cost)}",
        columns=COLUMNS,
        rows=[row(SettingResult(AS_CONFIGURED, cost), cost)],
        details={"step": asdict(cost)},
    )


def compare_size(
    config: Config[BenchmarkStage], size: Size, repeats: int, tracker: Tracker, advance: Callable[[int], None]
) -> Overhead:
    """Train the model of ``size`` in ``repeats`` turns of each loop, after :data:`WARM_UP` warm-up turns."""
    device = ranks.device()
    train = TrainStage(
        steps=(WARM_UP + repeats) * size.turn,
        batch_size=size.batch_size,
        sample_every=0,
        evaluate_every=0,
        save_every=0,
        warmup_steps=0,
    )
    dtype = loading.resolve_dtype(config.model, device)
    transformer = _transformer(size).to(device, dtype).train()
    engine = Engine(transformer, DeepSpeedConfig(zero_stage=config.deepspeed.zero_stage), train, dtype)
    clips: Any = RandomClips(CLIPS, LATENTS, transformer.config.max_text_seq_length, transformer.config.text_embed_dim)
    alphas = loading.load_scheduler(tiny.folder()).alphas_cumprod
    waits = DataWaits(tracker)
    objective = Objective(
        engine, alphas, TransformerInputs(scaling_factor=0.7), RankPlacement(), device=device, dtype=dtype
    )
    trainer = build_step_trainer(config.with_stage(train), clips, objective, tracker=waits)
    turns = TimedTurns(size.turn, device, advance, bare_steps(engine, trainer, size.batch_size))
    trainer.callbacks.items.append(turns)
    trainer.run()
    ours, bare = turns.ours[WARM_UP:], turns.theirs[WARM_UP:]
    # Each turn is compared with the bare turns before and after it, so that a drift of the machine favours neither
    # loop.
    sides = list(zip(ours, turns.theirs[WARM_UP - 1 :], bare, strict=False))
    ratios = sorted(2 * mine.wall / (before.wall + after.wall) for mine, before, after in sides)
    return Overhead(
        model=size.name,
        parameters=sum(parameter.numel() for parameter in transformer.parameters()),
        cogflow=median(turn.wall for turn in ours),
        bare=median(turn.wall for turn in bare),
        ratio=median(ratios),
        lowest=ratios[0],
        highest=ratios[-1],
        ratio_of_cpu_time=median(2 * mine.cores / (before.cores + after.cores) for mine, before, after in sides),
        data_wait=median(waits.seconds) / median(turn.wall for turn in ours),
        turns=len(ours),
    )


def _transformer(size: Size) -> CogVideoXTransformer3DModel:
    if size.heads is None:
        return loading.load_transformer(tiny.folder(), torch.float32)
    config = {
        **tiny.new_transformer().config,
        "num_attention_heads": size.heads,
        "attention_head_dim": 64,
        "num_layers": size.layers,
    }
    return CogVideoXTransformer3DModel.from_config(
        {name: value for name, value in config.items() if not name.startswith("_")}
    )


def bare_steps(engine: Engine, trainer: Trainer, batch_size: int) -> Iterator[None]:
    """Run the bare loop endlessly and yield after each step."""
    objective, clips = trainer.objective, len(trainer.batches.cache.train)
    alphas, dtype = objective.alphas_cumprod, objective.dtype
    batches = [_ready(trainer, number, batch_size) for number in range(max(1, clips // batch_size))]
    frames, _, rows, columns = batches[0].latents.shape[1:]
    tables = rotary_tables(engine.module, frames, rows, columns, device=trainer.device)
    for batch in itertools.cycle(batches):
        x_t = noised(batch.latents, batch.noise, alphas, batch.timesteps)
        v = engine.engine(
            hidden_states=batch.model_input(x_t).to(dtype),
            encoder_hidden_states=batch.embeds.to(dtype),
            timestep=batch.timesteps,
            image_rotary_emb=tables,
            return_dict=False,
            **objective.inputs.extra(trainer.device, dtype),
        )[0]
        engine.engine.backward(velocity_loss(v, batch.latents, x_t, alphas, batch.timesteps).mean)
        engine.engine.step()
        yield


def _ready(trainer: Trainer, number: int, batch_size: int) -> Batch:
    cache, inputs = trainer.batches.cache, trainer.objective.inputs
    chosen = [place % len(cache.train) for place in range(number * batch_size, (number + 1) * batch_size)]
    batch = training_batch(cache, chosen, (0, number), 0, inputs=inputs, text_dropout=0.1)
    return batch.to(trainer.device)


def format_overhead(found: Overhead) -> str:
    """Return the result of one size as text."""
    ratio = f"{found.ratio - 1:+.1%} compared with bare DeepSpeed ({found.ratio_of_cpu_time - 1:+.1%} of CPU time)"
    return f"{found.model}: {1000 * found.cogflow:.0f} ms a step, {ratio}"


if __name__ == "__main__":
    main()
