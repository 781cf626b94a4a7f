"""Step monitor: logs losses and spectra of the steps, and warns of spikes, skipped updates and weights that do not
change.

Steps leave their metrics on the device. The monitor reads them together, at the next step that is logged or that other
work follows.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping

import torch

from cogflow.config.train_settings import TrainStage
from cogflow.records.training_records import CallbackStates, SpikeRecord, StepMonitorState, TrendRecord
from cogflow.runtime.progress import Advancing
from cogflow.sharpness import spectrum
from cogflow.sharpness.trend import Trend
from cogflow.training import metric_table
from cogflow.training.callback import Callback, StepUpdate, TrainingContext
from cogflow.training.engine import Engine
from cogflow.training.step_checks import (
    SPIKE_SIGMAS,
    SPIKE_WINDOW,
    SkipCounter,
    SpikeDetector,
    UpdateCheck,
    unchanged_message,
)


def due(step: int, every: int, steps: int) -> bool:
    """Return whether work that happens every ``every`` steps (0: never), before step 1 and after the last, is due after
    ``step``.
    """
    return every > 0 and (step % every == 0 or step == steps)


class StepMonitor(Callback):
    """Follows the training steps. ``clips_per_step``: over all ranks."""

    def __init__(
        self, engine: Engine, stage: TrainStage, *, log_every: int, clips_per_step: int, device: torch.device
    ) -> None:
        self.engine, self.stage, self.device = engine, stage, device
        self.log_every, self.clips_per_step = log_every, clips_per_step
        self.update_check = UpdateCheck(engine.module)
        self.note = ""
        """The newest loss, for the progress bar."""
        self._unread: list[StepUpdate] = []
        self._began = time.perf_counter()
        self._last_spike_warning = -SPIKE_WINDOW
        self.load_state_dict(CallbackStates())

    def on_train_start(self, context: TrainingContext) -> None:
        self._unread = []
        self._last_spike_warning = context.step - SPIKE_WINDOW
        self.update_check.set_anchor(context.step)

    def on_step_start(self, context: TrainingContext) -> None:
        if not self._unread:
            # Evaluations and saves since the last step do not count.
            self._began = time.perf_counter()

    def on_step_end(self, context: TrainingContext, update: StepUpdate) -> None:
        self._unread.append(update)
        if context.stopping or self._metrics_are_due(update.step):
            self.read(context)

    def on_evaluate(self, context: TrainingContext) -> None:
        self._check_weights(context)

    def on_validate(self, context: TrainingContext) -> None:
        self._check_weights(context)

    def logs_step(self, step: int) -> bool:
        """Return whether the metrics of the step that makes it ``step`` finished steps are logged at the usual
        interval.
        """
        return step % self.log_every == 0

    def is_loss_spike(self, table: torch.Tensor) -> bool:
        """Return whether the mean loss of ``table`` is a spike; waits for the device."""
        return self.loss_spikes.is_spike(metric_table.mean_loss(table))

    def read(self, context: TrainingContext) -> None:
        """Read the metrics that steps left on the device, in one wait, and log and check them."""
        updates, self._unread = self._unread, []
        if not updates:
            return
        tables = torch.stack([update.table for update in updates]).cpu()
        seconds = (time.perf_counter() - self._began) / len(updates)
        data_wait = sum(update.data_wait for update in updates) / len(updates)
        for update, table in zip(updates, tables, strict=True):
            values = metric_table.losses(table, "train") | {
                "train/grad_norm": float(update.gradient_norm),
                "train/lr": update.learning_rate,
            }
            # The sum of finite values of this size does not overflow: one call instead of the three of torch.isfinite.
            if math.isfinite(float(table.sum())):
                values |= self._spectrum_metrics(update.step, table, context)
            values |= self._check_step(update, values, context)
            if self.logs_step(update.step) or update.step == self.stage.steps:
                context.tracker.log(update.step, {**values, **self._speed_metrics(seconds, data_wait)})
            self.note = f"loss {values['train/loss']:.4f}"

    def state_dict(self) -> dict[str, StepMonitorState]:
        trend = self.trend.state()
        state = StepMonitorState(
            trend=TrendRecord(quarters=trend["quarters"], means=trend["means"], reported=trend["reported"]),
            spikes=SpikeRecord(loss=self.loss_spikes.state_dict(), norm=self.norm_spikes.state_dict()),
            skipped=self.skipped.state_dict(),
        )
        return {"step_monitor": state}

    def load_state_dict(self, states: CallbackStates) -> None:
        state = states.step_monitor
        trend = state.trend
        self.trend = Trend({"quarters": trend.quarters, "means": trend.means, "reported": trend.reported})
        self.loss_spikes = SpikeDetector(state.spikes.loss)
        self.norm_spikes = SpikeDetector(state.spikes.norm)
        self.skipped = SkipCounter(state.skipped)

    def _metrics_are_due(self, step: int) -> bool:
        """Return whether ``step`` is logged, or work follows it that needs the metrics."""
        stage = self.stage
        every = (self.log_every, stage.evaluate_every, stage.sample_every, stage.save_every, stage.weights_every)
        return step == stage.steps or any(due(step, interval, stage.steps) for interval in every)

    def _check_weights(self, context: TrainingContext) -> None:
        """Log which share of the weights did not change since the last check; once for each step."""
        if context.step == 0 or context.step == self.update_check.anchor_step:
            return
        share, steps = self.update_check.unchanged_since_anchor(context.step)
        context.tracker.log(context.step, {"validation/weights_unchanged": share})
        if message := unchanged_message(context.step, share, steps):
            context.tracker.alert("the weights do not change", message)

    def _check_step(
        self, update: StepUpdate, values: Mapping[str, float], context: TrainingContext
    ) -> dict[str, float]:
        """Return the metrics of the step's checks; warn of a spike once in a window."""
        self.skipped.update(update.applied)
        sigmas = {
            "loss": self.loss_spikes.update(values["train/loss"]),
            "gradient norm": self.norm_spikes.update(values["train/grad_norm"]),
        }
        spikes = {name: value for name, value in sigmas.items() if value is not None}
        if spikes and update.step - self._last_spike_warning >= SPIKE_WINDOW:
            self._last_spike_warning = update.step
            context.tracker.alert("a spike", spike_message(update, spikes))
        metrics = {"train/skipped": float(self.skipped.total)}
        if spikes:
            metrics["train/spike"] = max(spikes.values())
        if update.unchanged is not None:
            metrics["train/weights_unchanged"] = float(update.unchanged)
        if (scale := self.engine.loss_scale()) is not None:
            metrics["train/loss_scale"] = scale
        return metrics

    def _spectrum_metrics(self, step: int, table: torch.Tensor, context: TrainingContext) -> dict[str, float]:
        """Return the spectra after ``step`` steps and their trend; warn of its findings.

        Equal on every rank, as the table is.
        """
        clips = {quarter + 1: count for quarter, count in enumerate(table[1].tolist())}
        bands = spectrum.bands(table[metric_table.LOSS_ROWS :])
        reading = self.trend.update(step, bands, clips)
        for change in reading.changes:
            context.tracker.alert(f"fine detail: {change.defect} ({change.level})", change.line())
        return metric_table.bands(table, "spectrum", bands) | {
            f"spectrum/{name}": value for name, value in reading.values.items()
        }

    def _speed_metrics(self, seconds: float, data_wait: float) -> dict[str, float]:
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device) / 1e9
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        return {
            "train/step_time": seconds,
            "train/data_wait": data_wait,
            "train/samples_per_second": self.clips_per_step / seconds,
            "train/memory_gb": memory,
        }


def spike_message(update: StepUpdate, spikes: Mapping[str, float]) -> str:
    """Return a message for the spikes of a step, in deviations by name."""
    found = " and ".join(
        f"{name} {value:.1f} deviations above its last {SPIKE_WINDOW} steps" for name, value in spikes.items()
    )
    action = "the update was skipped" if update.spike else "stage.on_spike=skip would skip such updates"
    return f"step {update.step}: {found} (more than {SPIKE_SIGMAS:g} is a spike); {action}"


class ProgressBar(Callback):
    """Advances the progress bar, also to where a run is resumed and back to where it is rolled back."""

    def __init__(self, bar: Advancing, monitor: StepMonitor) -> None:
        self.bar, self.monitor = bar, monitor
        self._shown = 0

    def on_train_start(self, context: TrainingContext) -> None:
        self.bar.advance(context.step - self._shown)
        self._shown = context.step

    def on_step_end(self, context: TrainingContext, update: StepUpdate) -> None:
        self.bar.advance(1, self.monitor.note)
        self._shown += 1
