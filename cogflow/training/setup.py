"""Build everything that training needs before its first step: the model, its engine, the callbacks and the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.data.latent_cache import LatentCache
from cogflow.models import loading
from cogflow.models.transformer_inputs import TransformerInputs, TransformerSettings
from cogflow.runtime import ranks
from cogflow.sampling.prompts import prompts_for
from cogflow.sampling.sampler import Request, Sampler, requests
from cogflow.tracking.tracker import Tracker
from cogflow.training import initial_weights, speed
from cogflow.training.batch import TrainingBatches
from cogflow.training.callback import Callbacks, TrainingContext
from cogflow.training.checkpointer import Checkpointer
from cogflow.training.ema import EMA
from cogflow.training.engine import Engine
from cogflow.training.evaluation import Evaluation
from cogflow.training.loop import Trainer
from cogflow.training.objective import Objective
from cogflow.training.policy import QualityPolicy
from cogflow.training.recomputation import recompute
from cogflow.training.run_identity import clips_per_step, trained_with, training_layout
from cogflow.training.sequence import RankPlacement, split
from cogflow.training.step_monitor import StepMonitor
from cogflow.training.validation import Validation


@dataclass(frozen=True)
class RunServices:
    """Services of a stage for its training: the run's folder, its tracker and the request to stop (collective)."""

    folder: Path
    tracker: Tracker
    stop_requested: Callable[[], bool]


def build(
    config: Config[TrainStage], cache: LatentCache, services: RunServices, kept: Mapping[str, int] | None = None
) -> tuple[Trainer, Checkpointer]:
    """Return the loop of ``config`` and what saves and resumes it. ``kept``: see :func:`recompute`. Collective."""
    stage = config.stage
    device = ranks.device()
    dtype = loading.resolve_dtype(config.model, device)
    source = loading.model_folder(config.model)
    torch.manual_seed(stage.seed)
    samples = validation_requests(config, cache, source, dtype) if stage.sample_every else []
    vae = loading.load_vae(source)
    scheduler = loading.load_scheduler(source)
    facts = trained_with(vae, scheduler, dtype)

    transformer = initial_weights.build(config, source, dtype, device, facts)
    initial_weights.freeze(transformer, stage.freeze)
    recompute(transformer, config.deepspeed, kept, speed.compile_mode(speed.how_compiled(config, device)))
    speed.prepare(transformer, config, device, dtype)
    split(transformer, config.parallel.sequence)
    transformer.train()
    engine = Engine(transformer, config.deepspeed, stage, dtype)
    ema = None
    if stage.ema_decay:
        ema_device = device if stage.ema_device == "auto" else "cpu"
        ema = EMA(engine, stage.ema_decay, warmup=stage.ema_warmup, every=stage.ema_every, device=ema_device)

    def make_sampler() -> Sampler:
        return Sampler(
            engine.module,
            vae,
            scheduler,
            cache.empty_embeds,
            config.sampling,
            frames=config.data.frames,
            height=config.data.height,
            width=config.data.width,
            device=device,
            dtype=dtype,
            images=bool(cache.image_variants),
        )

    context = TrainingContext(
        config, stage, services.folder, engine, ema, tracker=services.tracker, stop_requested=services.stop_requested
    )
    inputs = TransformerInputs.of(
        TransformerSettings.of_config(transformer.config),
        float(vae.config.scaling_factor),
        invert_scale_latents=bool(vae.config.invert_scale_latents),
    )
    placement = RankPlacement(config.parallel.sequence)
    objective = Objective(engine, scheduler.alphas_cumprod, inputs, placement, device=device, dtype=dtype)
    monitor = step_monitor(config, objective)
    evaluation = Evaluation(cache, objective, stage.batch_size, monitor)
    validation = Validation(config, cache, make_sampler, samples, float(vae.config.scaling_factor))
    # The order of this list is the order of work: the policy needs the outcome of the validation.
    callbacks = Callbacks([evaluation, monitor, validation])
    facts = replace(facts, max_sequence_length=int(transformer.config.max_text_seq_length))
    checkpointer = Checkpointer(config, cache, facts, callbacks, evaluation)
    callbacks.items += [QualityPolicy(checkpointer), checkpointer]
    batches = TrainingBatches(cache, stage, inputs, placement)
    return Trainer(context, batches, objective, monitor, callbacks), checkpointer


def build_step_trainer(
    config: Config[TrainStage],
    cache: LatentCache,
    objective: Objective,
    *,
    ema: EMA | None = None,
    tracker: Tracker | None = None,
) -> Trainer:
    """Return a loop that runs and monitors steps but evaluates, samples and saves nothing, for measurements.

    It ignores signals.
    """
    engine, stage = objective.engine, config.stage
    context = TrainingContext(
        config, stage, Path(), engine, ema, tracker=tracker or Tracker(), stop_requested=lambda: ranks.any_rank(False)
    )
    monitor = step_monitor(config, objective)
    batches = TrainingBatches(cache, stage, objective.inputs, objective.placement)
    return Trainer(context, batches, objective, monitor, Callbacks([monitor]))


def step_monitor(config: Config[TrainStage], objective: Objective) -> StepMonitor:
    """Return the monitor of the steps of ``config``."""
    return StepMonitor(
        objective.engine,
        config.stage,
        log_every=config.tracking.log_every,
        clips_per_step=clips_per_step(training_layout(config)),
        device=objective.device,
    )


def validation_requests(
    config: Config[TrainStage], cache: LatentCache, source: Path, dtype: torch.dtype
) -> list[Request]:
    """Return the samples of each validation, with their text embeddings. Collective.

    One rank embeds the prompts and frees T5, which is as large as the transformer, before the transformer is built. An
    image-to-video model is sampled from the first frames of held-out clips, with the clips' captions where no prompts
    are given.
    """
    clips = cache.holdout or cache.train
    name = "folder" if cache.image_variants else config.data.name  # the prompts of drawn clips belong to no picture
    prompts = prompts_for(config.sampling.prompts, name, [cache.texts[clip] for clip in clips])
    first_clip: dict[str, int] = {}
    for clip in clips if cache.image_variants else ():
        first_clip.setdefault(cache.texts[clip], clip)  # prompts are distinct captions: one clip for each
    images = [cache.first_frame(clip) for clip in list(first_clip.values())[: len(prompts)]]
    embeds = None
    if ranks.is_main():
        tokenizer = loading.load_tokenizer(source)
        encoder = loading.load_text_encoder(source, dtype, ranks.device())
        length = int(cache.empty_embeds.shape[0])
        embeds = loading.encode_prompts(tokenizer, encoder, [prompt.text for prompt in prompts], length).cpu()
    return requests(prompts, ranks.broadcast(embeds), config.sampling.seeds, images)
