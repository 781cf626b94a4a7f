"""The training loop: what happens at each step, in the order in which it happens."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cogflow import ranks
from cogflow.config.schema import Config, TrainStage
from cogflow.data.cache import LatentCache
from cogflow.data.order import indices
from cogflow.errors import QualityGateError, Stopped
from cogflow.models.inputs import Inputs
from cogflow.models.rotary import rotary_tables
from cogflow.sharpness import spectrum
from cogflow.sharpness.trend import Trend
from cogflow.training import figures
from cogflow.training.averages import Averages
from cogflow.training.batch import Batch, training_batch
from cogflow.training.ema import EMA
from cogflow.training.engine import Engine
from cogflow.training.heldout import heldout_table
from cogflow.training.objective import Losses, noised, velocity_loss
from cogflow.training.overfitting import Overfitting
from cogflow.training.rollback import Rollback, rate_factor
from cogflow.training.schedule import learning_rate

SCALE_OFF = 1.25
"""The held-out latents may be this many times larger or smaller than the model takes them to be, before the first step; 5B's and 2B's
scaling factors are 1.65 apart, which a tiny model sees as 1.44 or 1 / 1.49."""


@dataclass
class Hooks:
    """What the stage does beside training. Each is called on every rank with the number of finished steps."""

    log: Callable[[int, dict[str, float]], None]
    validate: Callable[[int], None]
    save: Callable[[int], None]
    stop: Callable[[], bool]
    advance: Callable[[str], None]
    warn: Callable[[str, str], None]


class Trainer:
    """Everything one step needs. ``alphas_cumprod``: fp32 ``[1000]`` of the scheduler the model is trained for."""

    def __init__(
        self, config: Config, engine: Engine, ema: EMA | None, cache: LatentCache, alphas_cumprod: torch.Tensor,
        inputs: Inputs, device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        if not isinstance(config.stage, TrainStage):
            raise TypeError("training needs the settings of stage=train")
        self.stage: TrainStage = config.stage
        self.engine, self.ema, self.cache = engine, ema, cache
        self.alphas_cumprod = alphas_cumprod.to(device)
        self.inputs, self.device, self.dtype = inputs, device, dtype
        self.log_every = config.tracking.log_every
        self.spectrum, self.trend = spectrum.Spectrum(), Trend()
        self.averages = Averages()
        self.overfitting = Overfitting()
        self._heldout: dict[str, Any] | None = None
        self.rollbacks: Sequence[Rollback] = ()
        self._rotary: dict[tuple[int, ...], Any] = {}

    def run(self, start: int, hooks: Hooks) -> None:
        """Train from step ``start`` to ``stage.steps``."""
        stage = self.stage
        if start == 0:
            self._between(0, hooks)
        for step in range(start, stage.steps):
            began = time.perf_counter()
            values, table = self.train_step(step)
            done = step + 1
            values |= self._follow(done, table, hooks)
            if done % self.log_every == 0 or done == stage.steps:
                hooks.log(done, {**values, **self._speed(time.perf_counter() - began)})
            hooks.advance(f"loss {values['train/loss']:.4f}")
            if done < stage.steps and hooks.stop():
                # Nothing else that is due: the grace time may be short, and a resumed run does it.
                hooks.save(done)
                raise Stopped(f"Stopped after step {done} of {stage.steps}; a checkpoint is saved.", "Run the same command again to go on.")
            self._between(done, hooks)

    def train_step(self, step: int) -> tuple[dict[str, float], torch.Tensor]:
        """One update; the loss is checked on all ranks before anything is changed by it. Also gives the step's table of figures."""
        table = figures.empty()
        for micro in range(self.stage.gradient_accumulation):
            batch = self._batch(step, micro)
            losses = self.losses(batch)
            # One collective and one wait for the device serve the log, the check and the indicator.
            reduced = ranks.total(self.table(losses, batch)).cpu()
            if not torch.isfinite(reduced[: figures.LOSS_ROWS]).all():
                raise QualityGateError(
                    f"The loss of step {step + 1} is not finite; the weights are still those of step {step}.",
                    "Lower stage.learning_rate or look at the data; the last checkpoint is whole.",
                )
            table += reduced
            self.engine.backward(losses.mean)
            rate = learning_rate(step, self.stage) * rate_factor(self.rollbacks, step)
            self.engine.step(rate)
        norm = self.engine.gradient_norm()
        if not math.isfinite(norm) and self.dtype != torch.float16:
            raise QualityGateError(
                f"The gradient of step {step + 1} is not finite.", "Lower stage.learning_rate, then resume from the last checkpoint."
            )
        if self.ema is not None:
            self.ema.update(self.engine)
        return {**figures.losses(table, "train"), "train/grad_norm": norm, "train/lr": rate}, table

    def table(self, losses: Losses, batch: Batch) -> torch.Tensor:
        """This rank's figures of ``batch``, on the device: losses, and the prediction's bands against the true latents'."""
        bands = self.spectrum.sums(losses.x0, batch.latents, self.alphas_cumprod[batch.timesteps])
        return figures.by_quarter(losses.per_sample, bands, batch.timesteps)

    def losses(self, batch: Batch) -> Losses:
        """Forward pass and objective of ``batch``, which lies on the device."""
        x_t = noised(batch.latents, batch.noise, self.alphas_cumprod, batch.timesteps)
        v = self.engine.forward(
            hidden_states=batch.seen(x_t).to(self.dtype),
            encoder_hidden_states=batch.embeds.to(self.dtype),
            timestep=batch.timesteps,
            image_rotary_emb=self._tables(batch.latents.shape),
            return_dict=False,
            **self.inputs.extra(self.device, self.dtype),
        )[0]
        return velocity_loss(v, batch.latents, x_t, self.alphas_cumprod, batch.timesteps)

    def evaluate(self) -> torch.Tensor | None:
        """The table of figures on the held-out clips with the weights of this moment; ``None`` without such clips. Collective."""
        self.engine.module.eval()
        table = heldout_table(
            self.cache, lambda batch: self.table(self.losses(batch), batch), self.stage.batch_size, self.inputs, self.device
        )
        self.engine.module.train()
        return table

    def _evaluate(self, done: int, hooks: Hooks) -> None:
        """The held-out figures of the model, and of its averages where there are any."""
        table = self.evaluate()
        if table is None:
            return
        found = spectrum.bands(table[figures.LOSS_ROWS :])
        values = figures.losses(table, "heldout") | figures.bands(table, "heldout")
        if (scale := spectrum.scale_seen(found)) is not None:
            values["heldout/scale"] = scale
        if done == 0:
            self.trend.anchor(found)
            if scale is not None and not 1 / SCALE_OFF < scale < SCALE_OFF:
                hooks.warn("latents at another scale than the model's", scale_line(scale, values["heldout/latent_std"]))
        self._heldout = {"step": done, "loss": values["heldout/loss"]}
        hooks.log(done, values)
        if line := self.overfitting.update(done, values["heldout/loss"]):
            hooks.warn("overfitting: the held-out loss rises", line)
        if self.ema is None:
            return
        with self.ema.applied(self.engine):
            averaged = self.evaluate()
        if averaged is None:
            return
        averages = figures.losses(averaged, "ema/heldout") | figures.bands(averaged, "ema")
        averages = {name.replace("ema/heldout/", "ema/heldout_"): value for name, value in averages.items()}
        hooks.log(done, averages)
        if line := self.averages.update(done, values["heldout/loss"], averages["ema/heldout_loss"]):
            hooks.warn("ema_behind: the averages stay behind", line)

    def heldout_loss(self, step: int) -> float | None:
        """The held-out loss after ``step`` steps, when it was the last one to be measured."""
        return self._heldout["loss"] if self._heldout and self._heldout["step"] == step else None

    def state(self) -> dict[str, Any]:
        """What the followers of the losses know, for a checkpoint's ``trainer.json``."""
        return {
            "trend": self.trend.state(),
            "averages": self.averages.state(),
            "overfitting": self.overfitting.state(),
            "heldout": self._heldout,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        self.trend, self.averages = Trend(state.get("trend")), Averages(state.get("averages"))
        self.overfitting = Overfitting(state.get("overfitting"))
        self._heldout = state.get("heldout")

    def _follow(self, done: int, table: torch.Tensor, hooks: Hooks) -> dict[str, float]:
        """The indicator's numbers after ``done`` steps; says what it finds. The same on every rank: the table is."""
        clips = {quarter + 1: count for quarter, count in enumerate(table[1].tolist())}
        reading = self.trend.update(done, spectrum.bands(table[figures.LOSS_ROWS :]), clips)
        for move in reading.moves:
            hooks.warn(f"fine detail: {move.kind} ({move.level})", move.line())
        return figures.bands(table, "spectrum") | {f"spectrum/{name}": value for name, value in reading.values.items()}

    def _between(self, done: int, hooks: Hooks) -> None:
        """What is due after ``done`` steps. A validation comes before the save: its result is known when the checkpoint is kept."""
        stage = self.stage
        if due(done, stage.evaluate_every, stage.steps):
            self._evaluate(done, hooks)
        if due(done, stage.sample_every, stage.steps):
            hooks.validate(done)
        if done > 0 and (done == stage.steps or (stage.save_every and done % stage.save_every == 0)):
            hooks.save(done)

    def _batch(self, step: int, micro: int) -> Batch:
        stage, rank, world = self.stage, ranks.rank(), ranks.world_size()
        chosen = indices(
            step, micro, train=self.cache.train, batch_size=stage.batch_size, accumulation=stage.gradient_accumulation,
            rank=rank, world=world, seed=stage.seed, groups=self.cache.groups,
        )  # fmt: skip
        # The slot is counted over accumulation and ranks, so that 2 ranks draw what 1 rank with 2 micro steps draws.
        first = (micro * world + rank) * stage.batch_size
        batch = training_batch(
            self.cache, chosen, (stage.seed, step), first, inputs=self.inputs, text_dropout=stage.text_dropout,
            image_dropout=stage.image_dropout,
        )  # fmt: skip
        return batch.to(self.device)

    def _tables(self, shape: Sequence[int]) -> Any:
        key = (shape[1], shape[3], shape[4])
        if key not in self._rotary:
            self._rotary[key] = rotary_tables(self.engine.module, *key, device=self.device)
        return self._rotary[key]

    def _speed(self, seconds: float) -> dict[str, float]:
        stage = self.stage
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device) / 1e9
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        samples = stage.batch_size * stage.gradient_accumulation * ranks.world_size()
        return {"train/step_time": seconds, "train/samples_per_second": samples / seconds, "train/memory_gb": memory}


def scale_line(scale: float, deviation: float) -> str:
    """What to say of latents at a scale that the model does not expect."""
    return (
        f"before the first step the model takes the clips' latents (deviation {deviation:.2f}) for {scale:.2f} times what it knows: were "
        "they prepared with another scaling_factor, or another VAE? Training moves the model to that scale, and the loss will not tell."
    )


def due(done: int, every: int, steps: int) -> bool:
    """Whether something that happens every ``every`` steps (0: never), before step 1 and after the last, happens after ``done``."""
    return every > 0 and (done % every == 0 or done == steps)
