"""The model, its engine and what samples it: all that is built once, before the first step."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cogflow import ranks
from cogflow.config.schema import Config, TrainStage
from cogflow.data.cache import LatentCache
from cogflow.models import components
from cogflow.sampling.prompts import prompts_for
from cogflow.sampling.sampler import Request, Sampler, requests
from cogflow.tracking.tracker import Tracker
from cogflow.training import checkpoint, retention, rollback
from cogflow.training.ema import EMA
from cogflow.training.engine import Engine
from cogflow.training.identity import TUNABLE, identity, trained_with
from cogflow.training.loop import Trainer
from cogflow.training.validation import Validation


class Prepared:
    """A run that is ready to train. ``folder`` is the run's."""

    def __init__(self, config: Config, cache: LatentCache, folder: Path, tracker: Tracker) -> None:
        if not isinstance(config.stage, TrainStage):
            raise TypeError("training needs the settings of stage=train")
        self.config, self.stage, self.cache, self.folder = config, config.stage, cache, folder
        self.device = ranks.device()
        self.dtype = components.resolve_dtype(config.model, self.device)
        self.source = components.model_folder(config.model)
        torch.manual_seed(self.stage.seed)
        prompts = prompts_for(config.sampling.prompts, config.data.name, [cache.texts[i] for i in cache.holdout or cache.train])
        wanted = self._requests(prompts)
        vae = components.load_vae(self.source)
        scheduler = components.load_scheduler(self.source)
        transformer = components.load_transformer(self.source, self.dtype, self.device)
        if config.deepspeed.activation_checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train()
        self.trained_with = trained_with(vae, scheduler, transformer, self.dtype)
        self.engine = Engine(transformer, config.deepspeed, self.stage, self.dtype)
        self.ema = EMA(self.engine, self.stage.ema_decay, warmup=self.stage.ema_warmup) if self.stage.ema_decay > 0 else None
        factor = float(vae.config.scaling_factor)
        self.trainer = Trainer(config, self.engine, self.ema, cache, scheduler.alphas_cumprod, factor, self.device, self.dtype)

        def sampler() -> Sampler:
            data = config.data
            return Sampler(
                self.engine.module, vae, scheduler, cache.empty_embeds, config.sampling,
                frames=data.frames, height=data.height, width=data.width, device=self.device, dtype=self.dtype,
            )  # fmt: skip

        self.validation = Validation(config, cache, folder, tracker, self.engine, self.ema, sampler, wanted, factor)

    def resume(self, found: Path | None, rollbacks: list[rollback.Rollback]) -> int:
        """Finished steps of the checkpoint ``found``, after loading it; 0 without one. Collective."""
        self.trainer.rollbacks = rollbacks
        if found is None:
            return 0
        trainer = checkpoint.load(found, self.engine, self.ema)
        step = int(trainer["step"])
        self.trainer.load(trainer)
        self.validation.replay(step)
        return step

    def save(self, done: int) -> None:
        """Publish the checkpoint of ``done`` steps, and let old ones go. Collective."""
        verdict = self.validation.verdict
        if verdict is not None:
            verdict |= {"heldout_loss": self.trainer.heldout_loss(int(verdict["step"]))}
        trainer = {
            "step": done,
            "family": self.config.model.name,
            "model": asdict(self.config.model),
            "trained_with": self.trained_with,
            "identity": identity(self.config, self.cache),
            "settings": {key: getattr(self.stage, key) for key in TUNABLE},
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "validation": verdict,
            "quiet": self.validation.quiet,
            **self.trainer.state(),
        }
        folder = self.folder / "checkpoints"
        checkpoint.save(folder, done, self.engine, self.ema, trainer)
        retention.remove_old(folder, last=self.stage.keep_last, best=self.stage.keep_best, quiet=self.validation.quiet)

    def _requests(self, prompts: Any) -> list[Request]:
        """Embed the prompts, and let the text encoder go before the transformer comes."""
        length = int(self.cache.empty_embeds.shape[0])
        tokenizer = components.load_tokenizer(self.source)
        encoder = components.load_text_encoder(self.source, self.dtype, self.device)
        embeds = components.encode_prompts(tokenizer, encoder, [prompt.text for prompt in prompts], length).cpu()
        return requests(prompts, embeds, self.config.sampling.seeds)
