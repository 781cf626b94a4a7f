"""The training loop: what happens at each step, in the order in which it happens."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cogflow.config.schema import Config, TrainStage
from cogflow.data.cache import LatentCache
from cogflow.data.order import indices
from cogflow.errors import QualityGateError, Stopped
from cogflow.models.transformer_inputs import TransformerInputs, rotary_tables
from cogflow.runtime import ranks
from cogflow.runtime.heartbeat import enter_phase
from cogflow.sampling.sampler import Interrupted
from cogflow.sharpness import spectrum
from cogflow.training import metric_table
from cogflow.training.batch import Batch, training_batch
from cogflow.training.ema import EMA
from cogflow.training.engine import Engine
from cogflow.training.evaluation import Evaluation
from cogflow.training.guards import MOST_SKIPPED, not_finite_line
from cogflow.training.heldout import heldout_table
from cogflow.training.loader import Loader
from cogflow.training.objective import Losses, noised, velocity_loss
from cogflow.training.rollback import Rollback, rate_factor
from cogflow.training.schedule import learning_rate
from cogflow.training.sequence import RankPlacement
from cogflow.training.step_monitor import Hooks, StepMonitor, Update

GO_ON = "Run the same command again to go on."


class Trainer:
    """Everything one step needs. ``alphas_cumprod``: fp32 ``[1000]`` of the scheduler the model is trained for.

    Nothing is read from the device at a step that is not logged: DeepSpeed itself waits for the gradient's norm, and that is all.
    """

    def __init__(
        self, config: Config[TrainStage], engine: Engine, ema: EMA | None, cache: LatentCache, alphas_cumprod: torch.Tensor,
        inputs: TransformerInputs, device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.stage: TrainStage = config.stage
        self.engine, self.ema, self.cache = engine, ema, cache
        self.alphas_cumprod = alphas_cumprod.to(device)
        self.inputs, self.device, self.dtype = inputs, device, dtype
        self.log_every, self.ahead = config.tracking.log_every, config.speed.prefetch
        self.spectrum = spectrum.Spectrum()
        self.place = RankPlacement(config.parallel.sequence)
        samples = self.stage.batch_size * self.stage.gradient_accumulation * self.place.data_ranks
        self.following = StepMonitor(engine, self.log_every, self.stage.steps, samples, device)
        self.evaluation = Evaluation(engine, ema, self.evaluate)
        self.rollbacks: Sequence[Rollback] = ()
        self._rotary: dict[tuple[int, ...], Any] = {}
        self._own: list[torch.Tensor] = []

    def run(self, start: int, hooks: Hooks, *, owed: bool = False) -> None:
        """Train from step ``start`` to ``stage.steps``. ``owed``: what is due after ``start`` was left to this run."""
        stage = self.stage
        self.following.begin(start)
        if start == 0 or owed:
            self._between(start, hooks)
        with Loader(self.batch, stage.gradient_accumulation, self.device, self.ahead) as loader:
            for step in range(start, stage.steps):
                update = self.train_step(step, loader)
                done = step + 1
                if not update.applied:
                    self._left_out(update, hooks, loader)
                elif self.ema is not None:
                    self.ema.after(done, self.engine)
                self.following.add(update)
                stop = done < stage.steps and hooks.stop()
                if stop or self._due(done):
                    self.following.read(hooks, loader.spent())
                hooks.advance(self.following.note)
                if stop:
                    # Nothing else that is due: the grace time may be short, and the run that goes on does it first.
                    hooks.stopped(done)
                    raise Stopped(f"Stopped after step {done} of {stage.steps}; a checkpoint is saved.", GO_ON)
                self._between(done, hooks)

    def train_step(self, step: int, loader: Loader) -> Update:
        """One update, which a gradient that is not finite on any rank leaves out before anything is changed by it."""
        stage, name = self.stage, f"step {step + 1}"
        table = metric_table.empty(self.device)
        self._own, applied, spike = [], False, False
        rate = learning_rate(step, stage) * rate_factor(self.rollbacks, step)
        looked_at = (step + 1) % self.log_every == 0
        for micro in range(stage.gradient_accumulation):
            enter_phase(f"{name}: waiting for data")
            batch = loader.take(step, micro)
            enter_phase(f"{name}: forward")
            losses = self.losses(batch)
            if self.place.counts:
                table += self.table(losses, batch)
            self._own.append(losses.per_sample.detach())
            enter_phase(f"{name}: backward")
            loader.go_on()
            self.engine.backward(losses.mean)
            if micro == stage.gradient_accumulation - 1:
                # One collective serves the log, the guards and the indicator.
                table = ranks.sum_over_ranks(table)
                spike = stage.on_spike == "skip" and self.following.loss_spikes.is_spike(metric_table.mean_loss(table))
                if looked_at:
                    self.following.movement.before()
            enter_phase(f"{name}: update")
            applied = self.engine.step(rate, skip=spike)
        norm = self.engine.gradient_norm() if applied else math.inf
        return Update(
            step + 1, table, norm, rate, applied, spike, self.following.movement.unchanged() if looked_at else None
        )

    def table(self, losses: Losses, batch: Batch) -> torch.Tensor:
        """This rank's figures of ``batch``, on the device: losses, and the prediction's bands against the true latents'."""
        bands = self.spectrum.sums(losses.x0, batch.latents, self.alphas_cumprod[batch.timesteps])
        return metric_table.by_quarter(losses.per_sample, bands, batch.timesteps)

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
            **self.place.arguments(),
        )[0]
        return velocity_loss(v, batch.latents, x_t, self.alphas_cumprod, batch.timesteps)

    def evaluate(self) -> torch.Tensor | None:
        """The table of figures on the held-out clips with the weights of this moment; ``None`` without such clips. Collective."""
        return heldout_table(
            self.cache,
            lambda batch: self.table(self.losses(batch), batch),
            self.stage.batch_size,
            self.inputs,
            self.device,
            self.place,
        )

    def state(self) -> dict[str, Any]:
        """What the followers of the losses know, for a checkpoint's ``trainer.json``."""
        return self.following.state() | self.evaluation.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        self.following.load(state)
        self.evaluation.load(state)

    def _due(self, done: int) -> bool:
        """Whether what the steps left on the device is to be read after ``done``: it is logged, or something follows that needs it."""
        stage = self.stage
        every = (self.log_every, stage.evaluate_every, stage.sample_every, stage.save_every, stage.weights_every)
        return done == stage.steps or any(due(done, one, stage.steps) for one in every)

    def _left_out(self, update: Update, hooks: Hooks, loader: Loader) -> None:
        """A step that changed nothing: a spike that was to be left out, fp16 looking for its loss scale, or a fault."""
        lost = [not bool(torch.isfinite(own).all()) for own in self._own]
        if update.spike or not (ranks.any_rank(any(lost)) or self.dtype != torch.float16):
            return
        self.following.read(hooks, loader.spent())
        mine = [name for micro, own in enumerate(lost) if own for name in self._names(update.done - 1, micro)]
        line = not_finite_line(update.done, ranks.gather(mine[:4]))
        if self.following.skipped.in_a_row + 1 >= MOST_SKIPPED:
            raise QualityGateError(
                f"{line}. It is the {MOST_SKIPPED}th step in a row that is left out.",
                "Lower stage.learning_rate or look at the data.",
            )
        hooks.not_finite(update.done - 1, line)

    def _between(self, done: int, hooks: Hooks) -> None:
        """What is due after ``done`` steps. A validation comes before the save: its result is known when the checkpoint is kept."""
        stage = self.stage
        sampled = due(done, stage.sample_every, stage.steps)
        before = copy.deepcopy(self.state()) if sampled else {}
        if due(done, stage.evaluate_every, stage.steps):
            enter_phase(f"step {done}: held-out loss")
            self.evaluation(done, self.following.trend, hooks.log, hooks.warn)
        if done > 0 and (sampled or due(done, stage.evaluate_every, stage.steps)):
            self.following.moved(done, hooks)
        if sampled:
            enter_phase(f"step {done}: validation")
            try:
                hooks.validate(done)
            except Interrupted:
                # Nothing of it counts: the run that goes on looks at the held-out clips again, too.
                self.load(before)
                if done > 0:
                    hooks.stopped(done)
                saved = "a checkpoint is saved" if done > 0 else "nothing is trained yet"
                raise Stopped(
                    f"Stopped in the validation after step {done} of {stage.steps}; {saved}.", GO_ON
                ) from None
        if done > 0 and due(done, stage.weights_every, stage.steps):
            enter_phase(f"step {done}: saving weights")
            hooks.save_weights(done)
        if done > 0 and (done == stage.steps or (stage.save_every and done % stage.save_every == 0)):
            enter_phase(f"step {done}: saving")
            hooks.save(done)
        self.following.go_on()

    def _chosen(self, step: int, micro: int) -> list[int]:
        stage = self.stage
        return indices(
            step, micro, train=self.cache.train, batch_size=stage.batch_size, accumulation=stage.gradient_accumulation,
            rank=self.place.data_rank, world=self.place.data_ranks, seed=stage.seed, groups=self.cache.groups,
        )  # fmt: skip

    def _names(self, step: int, micro: int) -> list[str]:
        return [self.cache.name_of(index) for index in self._chosen(step, micro)]

    def batch(self, step: int, micro: int) -> Batch:
        """What this rank trains on in ``micro`` step of ``step``, on the CPU: a pure function."""
        stage = self.stage
        # The slot is counted over accumulation and ranks, so that 2 ranks draw what 1 rank with 2 micro steps draws.
        first = (micro * self.place.data_ranks + self.place.data_rank) * stage.batch_size
        return training_batch(
            self.cache,
            self._chosen(step, micro),
            (stage.seed, step),
            first,
            inputs=self.inputs,
            text_dropout=stage.text_dropout,
            image_dropout=stage.image_dropout,
        )

    def _tables(self, shape: Sequence[int]) -> Any:
        key = (shape[1], shape[3], shape[4])
        if key not in self._rotary:
            self._rotary[key] = rotary_tables(self.engine.module, *key, device=self.device)
        return self._rotary[key]


def due(done: int, every: int, steps: int) -> bool:
    """Whether something that happens every ``every`` steps (0: never), before step 1 and after the last, happens after ``done``."""
    return every > 0 and (done % every == 0 or done == steps)
