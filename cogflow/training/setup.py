"""The model, its engine and what samples it: all that is built once, before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cogflow.artifacts.run_layout import RunLayout
from cogflow.config.schema import Config, TrainStage
from cogflow.data.cache import LatentCache
from cogflow.models import loading
from cogflow.models.transformer_inputs import TransformerInputs
from cogflow.runtime import ranks
from cogflow.sampling.prompts import prompts_for
from cogflow.sampling.sampler import Request, Sampler, requests
from cogflow.tracking.tracker import Tracker
from cogflow.training import checkpoint, initial_weights, retention, rollback, speed
from cogflow.training.ema import EMA
from cogflow.training.engine import Engine
from cogflow.training.loop import Trainer
from cogflow.training.parameter_filter import freeze
from cogflow.training.recomputation import recompute
from cogflow.training.run_identity import TUNABLE, check_facts, identity, layout_of, same_states, trained_with
from cogflow.training.sequence import split
from cogflow.training.validation import Validation


class TrainingSetup:
    """A run that is ready to train. ``folder`` is the run's; ``kept``: see :func:`recompute`."""

    def __init__(
        self,
        config: Config[TrainStage],
        cache: LatentCache,
        folder: Path,
        tracker: Tracker,
        kept: Mapping[str, int] | None = None,
    ) -> None:
        self.config, self.stage, self.cache, self.folder, self.tracker = config, config.stage, cache, folder, tracker
        self.device = ranks.device()
        self.dtype = loading.resolve_dtype(config.model, self.device)
        self.source = loading.model_folder(config.model)
        torch.manual_seed(self.stage.seed)
        wanted = self._requests() if self.stage.sample_every else []
        vae = loading.load_vae(self.source)
        scheduler = loading.load_scheduler(self.source)
        facts = trained_with(vae, scheduler, self.dtype)
        transformer = initial_weights.build(config, self.source, self.dtype, self.device, facts)
        freeze(transformer, self.stage.freeze)
        recompute(transformer, config.deepspeed, kept, speed.mode(speed.how_compiled(config, self.device)))
        speed.prepare(transformer, config, self.device, self.dtype)
        split(transformer, config.parallel.sequence)
        transformer.train()
        self.trained_with = facts | {"max_sequence_length": transformer.config.max_text_seq_length}
        self.engine = Engine(transformer, config.deepspeed, self.stage, self.dtype)
        self.ema = self._averages()
        factor = float(vae.config.scaling_factor)
        given = TransformerInputs.of(transformer.config, vae.config)
        self.trainer = Trainer(
            config, self.engine, self.ema, cache, scheduler.alphas_cumprod, given, self.device, self.dtype
        )

        def sampler() -> Sampler:
            data = config.data
            return Sampler(
                self.engine.module, vae, scheduler, cache.empty_embeds, config.sampling,
                frames=data.frames, height=data.height, width=data.width, device=self.device, dtype=self.dtype,
                images=bool(cache.image_variants),
            )  # fmt: skip

        self.validation = Validation(config, cache, folder, tracker, self.engine, self.ema, sampler, wanted, factor)

    def _averages(self) -> EMA | None:
        stage = self.stage
        if not stage.ema_decay:
            return None
        place = self.device if stage.ema_device == "auto" else "cpu"
        return EMA(self.engine, stage.ema_decay, warmup=stage.ema_warmup, every=stage.ema_every, device=place)

    def resume(self, found: Path | None, rollbacks: list[rollback.Rollback]) -> tuple[int, bool]:
        """Finished steps of the checkpoint ``found``, after loading it, and whether what is due after them is still owed; 0 and nothing
        without one. Collective."""
        self.trainer.rollbacks = rollbacks
        if found is None:
            return 0, False
        trainer = checkpoint.read_trainer(found)
        check_facts(trainer["trained_with"], self.trained_with, found)
        checkpoint.load(found, self.engine, self.ema, same_layout=same_states(trainer, self.config))
        step = int(trainer["step"])
        self.trainer.load(trainer)
        self.validation.replay(step)
        return step, bool(trainer.get("owed"))

    def save(self, done: int, *, owed: bool = False) -> None:
        """Publish the checkpoint of ``done`` steps, and let old ones go. ``owed``: without what else is due after them. Collective."""
        stage, folder = self.stage, RunLayout(self.folder).checkpoints
        saved = checkpoint.save(folder, done, self.engine, self.ema, self._trainer(done) | {"owed": owed})
        retention.remove_old(
            folder, last=stage.keep_last, every=stage.keep_every, best=stage.keep_best, quiet=self.validation.quiet
        )
        self._tell(done, saved, "checkpoint")

    def save_weights(self, done: int) -> None:
        """Publish the weights of ``done`` steps alone, for export. Collective."""
        saved = checkpoint.save(
            RunLayout(self.folder).weights, done, self.engine, self.ema, self._trainer(done), states=False
        )
        self._tell(done, saved, "checkpoint/weights")

    def _tell(self, done: int, saved: checkpoint.Saved, name: str) -> None:
        values = {f"{name}/seconds": saved.seconds, f"{name}/gb": saved.bytes / 1e9}
        self.tracker.log(done, values | {f"{name}/{part}_seconds": seconds for part, seconds in saved.parts.items()})

    def _trainer(self, done: int) -> dict[str, Any]:
        verdict = self.validation.verdict
        if verdict is not None:
            verdict |= {"heldout_loss": self.trainer.evaluation.loss(int(verdict["step"]))}
        return {
            "step": done,
            "family": self.config.model.name,
            "model": asdict(self.config.model),
            "trained_with": self.trained_with,
            "identity": identity(self.config, self.cache),
            "layout": layout_of(self.config),
            "settings": {key: getattr(self.stage, key) for key in TUNABLE},
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "validation": verdict,
            "quiet": self.validation.quiet,
            **self.trainer.state(),
        }

    def _requests(self) -> list[Request]:
        """Embed the prompts, on one rank, since T5 is as large as the model, and let it go before the transformer comes. Collective.

        Image to video is sampled from the first frames of held-out clips, with their captions where no prompts are given.
        """
        cache, data = self.cache, self.config.data
        places = cache.holdout or cache.train
        name = "folder" if cache.image_variants else data.name  # the prompts of drawn clips go with no picture
        prompts = prompts_for(self.config.sampling.prompts, name, [cache.texts[place] for place in places])
        first: dict[str, int] = {}
        for place in places if cache.image_variants else ():
            first.setdefault(cache.texts[place], place)  # one clip for each caption, as the prompts are
        images = [cache.first_frame(place) for place in list(first.values())[: len(prompts)]]
        embeds = None
        if ranks.is_main():
            tokenizer = loading.load_tokenizer(self.source)
            encoder = loading.load_text_encoder(self.source, self.dtype, self.device)
            length = int(self.cache.empty_embeds.shape[0])
            embeds = loading.encode_prompts(tokenizer, encoder, [prompt.text for prompt in prompts], length).cpu()
        return requests(prompts, ranks.broadcast(embeds), self.config.sampling.seeds, images)
