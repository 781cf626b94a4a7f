"""The held-out figures of the model, and of its averages where there are any; and what they say that the training loss does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cogflow.sharpness import spectrum
from cogflow.sharpness.trend import Trend
from cogflow.training import metric_table
from cogflow.training.ema import EMA
from cogflow.training.ema_check import Averages
from cogflow.training.engine import Engine
from cogflow.training.overfitting import Overfitting

SCALE_OFF = 1.25
"""The held-out latents may be this many times larger or smaller than the model takes them to be, before the first step; 5B's and 2B's
scaling factors are 1.65 apart, which a tiny model sees as 1.44 or 1 / 1.49."""

Log = Callable[[int, dict[str, float]], None]
Warn = Callable[[str, str], None]


class Evaluation:
    """``measure`` gives the table of :mod:`cogflow.training.metric_table` on the held-out clips with the weights of the moment, or ``None``
    where there are no such clips. Collective."""

    def __init__(self, engine: Engine, ema: EMA | None, measure: Callable[[], torch.Tensor | None]) -> None:
        self.engine, self.ema, self.measure = engine, ema, measure
        self.averages, self.overfitting = Averages(), Overfitting()
        self.last: dict[str, Any] | None = None

    def __call__(self, done: int, trend: Trend, log: Log, warn: Warn) -> None:
        """Measure after ``done`` steps, log and warn; before the first step ``trend`` starts from what is seen."""
        table = self._measured()
        if table is None:
            return
        found = spectrum.bands(table[metric_table.LOSS_ROWS :])
        values = metric_table.losses(table, "heldout") | metric_table.bands(table, "heldout", found)
        if (scale := spectrum.scale_seen(found)) is not None:
            values["heldout/scale"] = scale
        if done == 0:
            trend.anchor(found)
            if scale is not None and not 1 / SCALE_OFF < scale < SCALE_OFF:
                warn("latents at another scale than the model's", scale_line(scale, values["heldout/latent_std"]))
        self.last = {"step": done, "loss": values["heldout/loss"]}
        log(done, values)
        if line := self.overfitting.update(done, values["heldout/loss"]):
            warn("overfitting: the held-out loss rises", line)
        if self.ema is None:
            return
        with self.ema.applied(self.engine):
            averaged = self._measured()
        if averaged is None:
            return
        averages = metric_table.losses(averaged, "ema/heldout") | metric_table.bands(averaged, "ema")
        averages = {name.replace("ema/heldout/", "ema/heldout_"): value for name, value in averages.items()}
        log(done, averages)
        if line := self.averages.update(done, values["heldout/loss"], averages["ema/heldout_loss"]):
            warn("ema_behind: the averages stay behind", line)

    def loss(self, step: int) -> float | None:
        """The held-out loss after ``step`` steps, when it was the last one to be measured."""
        return self.last["loss"] if self.last and self.last["step"] == step else None

    def state(self) -> dict[str, Any]:
        return {"averages": self.averages.state(), "overfitting": self.overfitting.state(), "heldout": self.last}

    def load(self, state: Mapping[str, Any]) -> None:
        self.averages, self.overfitting = Averages(state.get("averages")), Overfitting(state.get("overfitting"))
        self.last = state.get("heldout")

    def _measured(self) -> torch.Tensor | None:
        self.engine.module.eval()
        try:
            return self.measure()
        finally:
            self.engine.module.train()


def scale_line(scale: float, deviation: float) -> str:
    """What to say of latents at a scale that the model does not expect."""
    return (
        f"before the first step the model takes the clips' latents (deviation {deviation:.2f}) for {scale:.2f} times what it knows: were "
        "they prepared with another scaling_factor, or another VAE? Training moves the model to that scale, and the loss will not tell."
    )
