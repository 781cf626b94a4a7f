"""Held-out evaluation: losses on clips kept away from training, of the model and its EMA, and checks of what they show.

Clips, timesteps and noise are fixed, so the losses are comparable from step to step and run to run.
"""

from __future__ import annotations

import torch

from cogflow.data.latent_cache import LatentCache
from cogflow.records.training_records import (
    CallbackStates,
    EmaCheckRecord,
    EvaluationState,
    HeldoutLoss,
    OverfittingRecord,
)
from cogflow.runtime import ranks
from cogflow.sharpness import spectrum
from cogflow.training import metric_table
from cogflow.training.batch import HELDOUT_TIMESTEPS, heldout_batch
from cogflow.training.callback import Callback, TrainingContext
from cogflow.training.objective import Objective
from cogflow.training.step_monitor import StepMonitor

MAX_SCALE_RATIO = 1.25
"""Largest ratio between the held-out latents' scale and the scale that the model expects, before the first step.

The scaling factors of 5B and 2B are 1.65 apart, which a tiny model sees as 1.44 or 1 / 1.49.
"""

OVERFITTING_RISE = 0.15
"""Share by which the held-out loss must exceed its lowest value.

Noise and timesteps are the same every time: in 120 healthy steps of the tiny model it rises by at most 0.02; trained on
four clips it is up by 0.2 after 60 steps, and doubled after 360.
"""
EMA_CHECK_FALL = 0.05
"""Share of its first value by which the model's held-out loss must have fallen before the EMA is judged."""
EMA_BEHIND_SHARE = 0.25
"""Share of the model's fall: an EMA whose loss fell by less is behind."""
CONSECUTIVE_EVALUATIONS = 2
"""Evaluations in a row that must show the same before a check warns."""


class OverfittingCheck:
    """Finds a held-out loss that rises for good: the model overfits, although its samples stay sharp."""

    def __init__(self, state: OverfittingRecord | None = None) -> None:
        state = state or OverfittingRecord()
        self.lowest = state.lowest
        self.above = state.above
        self.reported_step = state.reported_step

    def state_dict(self) -> OverfittingRecord:
        return OverfittingRecord(self.lowest, self.above, self.reported_step)

    def update(self, step: int, heldout: float) -> str | None:
        """Add the held-out loss after ``step`` steps; return a message the first time that it has risen for good."""
        if self.lowest is None or heldout < self.lowest.loss:
            self.lowest = HeldoutLoss(step, heldout)
            self.above = 0
            return None
        self.above = self.above + 1 if heldout > (1 + OVERFITTING_RISE) * self.lowest.loss else 0
        if self.above < CONSECUTIVE_EVALUATIONS or self.reported_step is not None:
            return None
        self.reported_step = step
        return (
            f"step {step}: the held-out loss is {heldout:.4g}, after {self.lowest.loss:.4g} at step "
            f"{self.lowest.step}: the model "
            "overfits its clips, or the learning rate is too high. Train shorter, on more clips, or with a lower "
            "stage.learning_rate."
        )


class EmaCheck:
    """Finds an EMA that does not keep up with the model, by the held-out losses of both."""

    def __init__(self, state: EmaCheckRecord | None = None) -> None:
        state = state or EmaCheckRecord()
        self.first = state.first
        self.behind = state.behind
        self.reported_step = state.reported_step

    def state_dict(self) -> EmaCheckRecord:
        return EmaCheckRecord(self.first, self.behind, self.reported_step)

    def update(self, step: int, model: float, ema: float) -> str | None:
        """Add the losses after ``step`` steps; return a message the first time that the EMA is behind."""
        if self.first is None:
            self.first = model
            return None
        fall = self.first - model
        slow = fall > EMA_CHECK_FALL * self.first and self.first - ema < EMA_BEHIND_SHARE * fall
        self.behind = self.behind + 1 if slow else 0
        if self.behind < CONSECUTIVE_EVALUATIONS or self.reported_step is not None:
            return None
        self.reported_step = step
        return (
            f"step {step}: the model's held-out loss fell from {self.first:.4g} to {model:.4g}, the EMA's only to "
            f"{ema:.4g}: samples and "
            "exports show the EMA. Lower stage.ema_decay, use stage.ema_warmup=true, or export with "
            "stage.weights=model."
        )


class Evaluation(Callback):
    """Evaluates the held-out clips, where there are any.

    ``monitor``: its trend starts from the spectra before the first step.
    """

    def __init__(self, cache: LatentCache, objective: Objective, batch_size: int, monitor: StepMonitor) -> None:
        self.cache, self.objective, self.batch_size, self.monitor = cache, objective, batch_size, monitor
        self.last: HeldoutLoss | None = None
        self.load_state_dict(CallbackStates())

    def on_evaluate(self, context: TrainingContext) -> None:
        """Log the held-out metrics of the model and its EMA, and warn of what the checks find. Collective."""
        table = self._heldout_table()
        if table is None:
            return
        bands = spectrum.bands(table[metric_table.LOSS_ROWS :])
        values = metric_table.losses(table, "heldout") | metric_table.bands(table, "heldout", bands)
        if (scale := spectrum.scale_seen(bands)) is not None:
            values["heldout/scale"] = scale
        if context.step == 0:
            self.monitor.trend.anchor(bands)
            if scale is not None and not 1 / MAX_SCALE_RATIO < scale < MAX_SCALE_RATIO:
                deviation = values["heldout/latent_std"]
                context.tracker.alert("latents at another scale than the model's", scale_message(scale, deviation))
        self.last = HeldoutLoss(context.step, values["heldout/loss"])
        context.tracker.log(context.step, values)
        if message := self.overfitting.update(context.step, values["heldout/loss"]):
            context.tracker.alert("overfitting: the held-out loss rises", message)
        self._evaluate_ema(context, values["heldout/loss"])

    def loss_at(self, step: int) -> float | None:
        """Return the held-out loss after ``step`` steps when that was the last evaluation, else ``None``."""
        return self.last.loss if self.last is not None and self.last.step == step else None

    def state_dict(self) -> dict[str, EvaluationState]:
        state = EvaluationState(self.ema_check.state_dict(), self.overfitting.state_dict(), self.last)
        return {"evaluation": state}

    def load_state_dict(self, states: CallbackStates) -> None:
        state = states.evaluation
        self.ema_check = EmaCheck(state.ema_check)
        self.overfitting = OverfittingCheck(state.overfitting)
        self.last = state.last

    def _evaluate_ema(self, context: TrainingContext, model_loss: float) -> None:
        if context.ema is None:
            return
        with context.ema.applied(context.engine):
            table = self._heldout_table()
        if table is None:
            return
        values = metric_table.losses(table, "ema/heldout") | metric_table.bands(table, "ema")
        values = {name.replace("ema/heldout/", "ema/heldout_"): value for name, value in values.items()}
        context.tracker.log(context.step, values)
        if message := self.ema_check.update(context.step, model_loss, values["ema/heldout_loss"]):
            context.tracker.alert("ema_behind: the EMA does not keep up", message)

    def _heldout_table(self) -> torch.Tensor | None:
        module = self.objective.engine.module
        module.eval()
        try:
            return heldout_table(self.cache, self.objective, self.batch_size)
        finally:
            module.train()


@torch.no_grad()
def heldout_table(cache: LatentCache, objective: Objective, batch_size: int) -> torch.Tensor | None:
    """Return the metric table over all pairs of a held-out clip and a fixed timestep; ``None`` without held-out clips.

    Collective.

    Every rank runs the same number of forward passes. A rank without a chunk of its own repeats the last one and does
    not count it; ranks that share their batches count them once.
    """
    pairs = [(index, timestep) for index in cache.holdout for timestep in HELDOUT_TIMESTEPS]
    if not pairs:
        return None
    chunks = [
        chunk
        for alike in cache.group_by_size(pairs)
        for chunk in (alike[at : at + batch_size] for at in range(0, len(alike), batch_size))
    ]
    placement = objective.placement
    sums = metric_table.empty(objective.device)
    for turn in range(-(-len(chunks) // placement.data_ranks)):
        number = turn * placement.data_ranks + placement.data_rank
        batch = heldout_batch(cache, chunks[min(number, len(chunks) - 1)], inputs=objective.inputs)
        batch = batch.to(objective.device)
        table = objective.metric_table(objective.losses(batch), batch)
        if number < len(chunks) and placement.counts:
            sums += table
    return ranks.sum_over_ranks(sums).cpu()


def scale_message(scale: float, deviation: float) -> str:
    """Return a message for latents at a scale that the model does not expect."""
    return (
        f"before the first step the model sees the clips' latents (deviation {deviation:.2f}) at {scale:.2f} times the "
        "scale it knows: "
        "were they prepared with another scaling_factor, or another VAE? Training moves the model to that scale, and "
        "the loss does not show it."
    )
