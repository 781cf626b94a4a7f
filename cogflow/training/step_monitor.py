"""What follows the steps: losses and the indicator to the log, spikes, left-out steps and weights that do not move to whoever watches.

Steps leave their figures on the device; they are read together, at the next step that is logged or that something else follows.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cogflow.sharpness import spectrum
from cogflow.sharpness.trend import Trend
from cogflow.training import metric_table
from cogflow.training.engine import Engine
from cogflow.training.guards import SIGMAS, WINDOW, Skipped, Spikes
from cogflow.training.update_check import UpdateCheck, stuck_line


@dataclass
class Hooks:
    """What the stage does beside training. Each is called on every rank with the number of finished steps.

    ``stopped``: save, and leave what else is due to the run that goes on. ``not_finite(step, line)``: the step after ``step`` left the
    weights as they were, for the reason that ``line`` tells; raise, or return to go on without it.
    """

    log: Callable[[int, dict[str, float]], None]
    validate: Callable[[int], None]
    save: Callable[[int], None]
    stopped: Callable[[int], None]
    save_weights: Callable[[int], None]
    stop: Callable[[], bool]
    advance: Callable[[str], None]
    warn: Callable[[str, str], None]
    not_finite: Callable[[int, str], None]


@dataclass(frozen=True)
class Update:
    """What the step that made it ``done`` steps leaves behind, on the device until it is read. ``unchanged``: share of the weights."""

    done: int
    table: torch.Tensor
    norm: torch.Tensor | float
    rate: float
    applied: bool
    spike: bool
    unchanged: torch.Tensor | None


class StepMonitor:
    """``samples``: clips of one step over all ranks."""

    def __init__(self, engine: Engine, log_every: int, steps: int, samples: int, device: torch.device) -> None:
        self.engine, self.log_every, self.steps, self.samples, self.device = engine, log_every, steps, samples, device
        self.movement = UpdateCheck(engine.module)
        self.note = ""
        self._unread: list[Update] = []
        self._began, self._told_spike = time.perf_counter(), -WINDOW
        self.load({})

    def begin(self, step: int) -> None:
        """Training goes on after ``step``: nothing is left of what was before."""
        self._unread, self._told_spike = [], step - WINDOW
        self.movement.anchor(step)
        self.go_on()

    def go_on(self) -> None:
        """The clock of the next step starts now: what was between was none of it."""
        self._began = time.perf_counter()

    def add(self, update: Update) -> None:
        self._unread.append(update)

    def read(self, hooks: Hooks, waited: float) -> None:
        """Bring what the steps left on the device to the host, in one wait, and follow it. ``waited``: seconds they waited for data."""
        updates, self._unread = self._unread, []
        if not updates:
            return
        tables = torch.stack([update.table for update in updates]).cpu()
        seconds, waited = (time.perf_counter() - self._began) / len(updates), waited / len(updates)
        for update, table in zip(updates, tables, strict=True):
            values = metric_table.losses(table, "train") | {
                "train/grad_norm": float(update.norm),
                "train/lr": update.rate,
            }
            # A sum of what is finite, and of no size to overflow: one call where torch.isfinite takes three.
            if math.isfinite(float(table.sum())):
                values |= self._follow(update.done, table, hooks)
            values |= self._guarded(update, values, hooks)
            if update.done % self.log_every == 0 or update.done == self.steps:
                hooks.log(update.done, {**values, **self._speed(seconds, waited)})
            self.note = f"loss {values['train/loss']:.4f}"
        self.go_on()

    def moved(self, done: int, hooks: Hooks) -> None:
        """Say how much of the weights moved since this was asked last."""
        share, steps = self.movement.since_anchor(done)
        hooks.log(done, {"validation/weights_unchanged": share})
        if line := stuck_line(done, share, steps):
            hooks.warn("the weights do not move", line)

    def state(self) -> dict[str, Any]:
        return {
            "trend": self.trend.state(),
            "spikes": {"loss": self.loss_spikes.state(), "norm": self.norm_spikes.state()},
            "skipped": self.skipped.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.trend = Trend(state.get("trend"))
        spikes = state.get("spikes") or {}
        self.loss_spikes, self.norm_spikes = Spikes(spikes.get("loss")), Spikes(spikes.get("norm"))
        self.skipped = Skipped(state.get("skipped"))

    def _guarded(self, update: Update, values: Mapping[str, float], hooks: Hooks) -> dict[str, float]:
        """What the guards say of a step, in numbers; a spike is told, once in a window."""
        self.skipped.update(update.applied)
        sigmas = {
            "loss": self.loss_spikes.update(values["train/loss"]),
            "gradient norm": self.norm_spikes.update(values["train/grad_norm"]),
        }
        spikes = {name: value for name, value in sigmas.items() if value is not None}
        if spikes and update.done - self._told_spike >= WINDOW:
            self._told_spike = update.done
            what = " and ".join(
                f"{name} {value:.1f} deviations above its last {WINDOW} steps" for name, value in spikes.items()
            )
            dealt = "the step was left out" if update.spike else "stage.on_spike=skip would leave such steps out"
            hooks.warn("a spike", f"step {update.done}: {what} (over {SIGMAS:g} is a spike); {dealt}")
        found = {"train/skipped": float(self.skipped.total)}
        if spikes:
            found["train/spike"] = max(spikes.values())
        if update.unchanged is not None:
            found["train/weights_unchanged"] = float(update.unchanged)
        if (scale := self.engine.loss_scale()) is not None:
            found["train/loss_scale"] = scale
        return found

    def _follow(self, done: int, table: torch.Tensor, hooks: Hooks) -> dict[str, float]:
        """The indicator's numbers after ``done`` steps; says what it finds. The same on every rank: the table is."""
        clips = {quarter + 1: count for quarter, count in enumerate(table[1].tolist())}
        found = spectrum.bands(table[metric_table.LOSS_ROWS :])
        reading = self.trend.update(done, found, clips)
        for change in reading.changes:
            hooks.warn(f"fine detail: {change.defect} ({change.level})", change.line())
        return metric_table.bands(table, "spectrum", found) | {
            f"spectrum/{name}": value for name, value in reading.values.items()
        }

    def _speed(self, seconds: float, waited: float) -> dict[str, float]:
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device) / 1e9
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        return {
            "train/step_time": seconds,
            "train/data_wait": waited,
            "train/samples_per_second": self.samples / seconds,
            "train/memory_gb": memory,
        }
