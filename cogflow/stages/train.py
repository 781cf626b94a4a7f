"""stage=train: full finetuning under DeepSpeed, with samples from fixed noise before the first step and while it goes on."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cogflow import ranks
from cogflow.config.schema import Config, TrainStage
from cogflow.data.cache import LatentCache
from cogflow.errors import CheckpointError, ConfigError
from cogflow.files.paths import run_folder
from cogflow.models import components
from cogflow.sampling import gallery
from cogflow.sampling.prompts import prompts_for
from cogflow.sampling.sampler import Request, Sampler, requests
from cogflow.tracking.console import say
from cogflow.tracking.progress import progress
from cogflow.tracking.record import write_record
from cogflow.tracking.report import write_report
from cogflow.tracking.tracker import open_tracker
from cogflow.training import checkpoint
from cogflow.training.ema import EMA
from cogflow.training.engine import Engine
from cogflow.training.loop import Hooks, Trainer
from cogflow.training.signals import StopRequest
from cogflow.weights.fingerprint import fingerprint

FIXED = ("batch_size", "gradient_accumulation", "seed")
"""Settings of the stage that a resumed run must share with its checkpoint: they settle the order of the data."""

TUNABLE = ("steps", "learning_rate", "schedule", "warmup_steps", "min_lr_ratio", "text_dropout", "gradient_clipping")
"""Settings that may change on resume; said, because the run is then not what one uninterrupted run would be."""


def run(config: Config) -> None:
    """Train ``<run>/cache`` into ``<run>/checkpoints``; the same command resumes. Works alone and under torchrun."""
    stage = config.stage
    if not isinstance(stage, TrainStage):
        raise TypeError("stages.train needs the settings of stage=train")
    started = time.time()
    ranks.setup()
    folder = run_folder(config.run)
    cache = open_cache(config, folder)
    found, passed = checkpoint.find(stage.resume, folder / "checkpoints")
    for line in passed:
        say(f"warning: checkpoint passed over: {line}")
    before = checkpoint.read_trainer(found) if found else None
    if before is not None:
        check_same(before, config, cache)
        if before["step"] >= stage.steps:
            say(f"this run is finished: {found} stands at step {before['step']} of {stage.steps}; give more stage.steps to go on")
            return
    prepared = Prepared(config, cache)
    with open_tracker(config, "train", folder) as tracker:
        step = prepared.resume(found)
        tracker.rewind(step)
        if step:
            say(f"resuming {folder} after step {step}")
        with StopRequest() as request, progress(stage.steps, "training") as bar:
            bar.advance(step)
            hooks = Hooks(
                log=tracker.log,
                validate=lambda done: prepared.validate(done, folder, tracker),
                save=lambda done: prepared.save(done, folder),
                stop=lambda: request.anywhere(prepared.device),
                advance=lambda note: bar.advance(1, note),
                warn=tracker.alert,
            )
            prepared.trainer.run(step, hooks)
        tracker.artifact(
            "checkpoint", "checkpoint", [folder / "checkpoints" / checkpoint.step_name(stage.steps) / "trainer.json"], uses=["clips"]
        )
        finish(config, folder, cache, prepared, started, tracker.url_or_dir)


def open_cache(config: Config, folder: Path) -> LatentCache:
    """The prepared clips, which must have been made with this config's data settings."""
    cache = LatentCache(folder / "cache")
    if problems := cache.mismatches(config.data):
        raise ConfigError("The prepared clips were made with other settings: " + "; ".join(problems), "Run stage=prepare again.")
    return cache


def check_same(trainer: dict[str, Any], config: Config, cache: LatentCache) -> None:
    """Raise :class:`CheckpointError` listing what differs between a checkpoint and the config that is to resume it."""
    now = identity(config, cache)
    for key in TUNABLE:
        then, value = trainer["settings"][key], getattr(config.stage, key)
        if then != value:
            say(f"warning: stage.{key} is now {value}, it was {then}: from here on this is another run than an uninterrupted one")
    different = [
        f"{key}: {trainer['identity'].get(key)} then, {value} now" for key, value in now.items() if trainer["identity"].get(key) != value
    ]
    if different:
        raise CheckpointError(
            "The checkpoint was trained with other settings:\n  " + "\n  ".join(different),
            "Give the same settings again, start anew with stage.resume=never, or use another run.name.",
        )


def identity(config: Config, cache: LatentCache) -> dict[str, Any]:
    """What must not change between a checkpoint and its resumption."""
    return {
        **{f"stage.{key}": getattr(config.stage, key) for key in FIXED},
        "data": cache.fingerprint,
        "deepspeed.zero_stage": config.deepspeed.zero_stage,
        "world size": ranks.world_size(),
        "model": config.model.name,
        "dtype": components.dtype_name(components.resolve_dtype(config.model, ranks.device())),
    }


class Prepared:
    """The model, its engine and what samples it: all that is built once, before the first step."""

    def __init__(self, config: Config, cache: LatentCache) -> None:
        assert isinstance(config.stage, TrainStage)
        self.config, self.stage, self.cache = config, config.stage, cache
        self.device = ranks.device()
        self.dtype = components.resolve_dtype(config.model, self.device)
        self.source = components.model_folder(config.model)
        torch.manual_seed(self.stage.seed)
        prompts = prompts_for(config.sampling.prompts, config.data.name, [cache.texts[i] for i in cache.holdout or cache.train])
        self.requests = self._requests(prompts)
        self.vae = components.load_vae(self.source)
        self.scheduler = components.load_scheduler(self.source)
        transformer = components.load_transformer(self.source, self.dtype, self.device)
        if config.deepspeed.activation_checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train()
        self.trained_with = trained_with(self.vae, self.scheduler, transformer, self.dtype)
        self.engine = Engine(transformer, config.deepspeed, self.stage, self.dtype)
        self.ema = EMA(self.engine, self.stage.ema_decay, warmup=self.stage.ema_warmup) if self.stage.ema_decay > 0 else None
        scaling_factor = float(self.vae.config.scaling_factor)
        self.trainer = Trainer(config, self.engine, self.ema, cache, self.scheduler.alphas_cumprod, scaling_factor, self.device, self.dtype)

    def resume(self, found: Path | None) -> int:
        """Finished steps of the checkpoint ``found``, after loading it; 0 without one."""
        if found is None:
            return 0
        trainer = checkpoint.load(found, self.engine, self.ema)
        self.trainer.load(trainer)
        return int(trainer["step"])

    def validate(self, done: int, folder: Path, tracker: Any) -> None:
        """Sample every prompt from its fixed noise with the weights of this moment."""
        data, began = self.config.data, time.perf_counter()
        target = folder / "samples" / checkpoint.step_name(done)
        with self.ema.applied(self.engine) if self.ema is not None else contextlib.nullcontext():
            facts = {
                "step": done,
                "weights": "ema" if self.ema is not None else "model",
                "weights_sha256": fingerprint(self.engine.weights()),
            }
            sampler = Sampler(
                self.engine.module, self.vae, self.scheduler, self.cache.empty_embeds, self.config.sampling,
                frames=data.frames, height=data.height, width=data.width, device=self.device, dtype=self.dtype,
            )  # fmt: skip
            record = gallery.sample_into(target, sampler, self.requests, fps=data.fps, facts=facts, title=f"samples at step {done}")
        if not ranks.is_main():
            return
        gallery.drop_frames(folder / "samples", keep=target)
        tracker.log(done, {**gallery.mean_sharpness(record), "validation/seconds": time.perf_counter() - began})
        tracker.image(done, "samples/contact_sheet", target / "contact.png")
        for sample in record["samples"]:
            tracker.video(done, f"samples/{sample['name']}", target / sample["video"], sample["text"])
        write_report(folder)

    def save(self, done: int, folder: Path) -> None:
        trainer = {
            "step": done,
            "family": self.config.model.name,
            "model": asdict(self.config.model),
            "trained_with": self.trained_with,
            "identity": identity(self.config, self.cache),
            "settings": {key: getattr(self.stage, key) for key in TUNABLE},
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            **self.trainer.state(),
        }
        checkpoint.save(folder / "checkpoints", done, self.engine, self.ema, trainer)
        checkpoint.remove_old(folder / "checkpoints", self.stage.keep_last)

    def _requests(self, prompts: Any) -> list[Request]:
        """Embed the prompts, and let the text encoder go before the transformer comes."""
        length = int(self.cache.empty_embeds.shape[0])
        tokenizer = components.load_tokenizer(self.source)
        encoder = components.load_text_encoder(self.source, self.dtype, self.device)
        embeds = components.encode_prompts(tokenizer, encoder, [prompt.text for prompt in prompts], length).cpu()
        return requests(prompts, embeds, self.config.sampling.seeds)


def trained_with(vae: Any, scheduler: Any, transformer: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The facts an export must carry: with other values the same weights give blurred or broken videos."""
    names = ("snr_shift_scale", "prediction_type", "timestep_spacing", "rescale_betas_zero_snr")
    return {
        "scaling_factor": vae.config.scaling_factor,
        "invert_scale_latents": bool(vae.config.get("invert_scale_latents", False)),
        **{name: scheduler.config[name] for name in names},
        "dtype": components.dtype_name(dtype),
        "max_sequence_length": transformer.config.max_text_seq_length,
    }


def finish(config: Config, folder: Path, cache: LatentCache, prepared: Prepared, started: float, wandb: str) -> None:
    """Write ``train.json`` and the report, and say where everything is."""
    if not ranks.is_main():
        return
    stage = prepared.stage
    last = folder / "checkpoints" / checkpoint.step_name(stage.steps)
    samples = gallery.newest(folder / "samples")
    summary = f"{stage.steps} steps of {stage.batch_size * stage.gradient_accumulation * ranks.world_size()} clips"
    inputs = {"model": str(prepared.source), "data": cache.fingerprint}
    results = {"summary": summary, "where": str(last), "samples": str(samples) if samples else None, "wandb": wandb}
    write_record(folder, "train", config, inputs, results, started=started)
    report = write_report(folder)
    say(f"checkpoint: {last}\nsamples:    {samples or 'none (stage.sample_every=0)'}\nreport:     {report}\nW&B:        {wandb}")
