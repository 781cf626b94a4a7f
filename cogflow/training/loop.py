"""The training loop: resume, then for each step a batch, forward, backward, update, and the work due after it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cogflow.errors import QualityGateError, Stopped
from cogflow.records.history_records import current_line
from cogflow.records.training_records import CallbackStates
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.runtime.heartbeat import enter_phase
from cogflow.sampling.sampler import Interrupted
from cogflow.training import metric_table
from cogflow.training.batch import Loader, TrainingBatches
from cogflow.training.callback import Callbacks, StepUpdate, TrainingContext
from cogflow.training.checkpointer import Checkpointer
from cogflow.training.objective import Objective, learning_rate
from cogflow.training.rollback import RollbackRequested, StartPoint, begin, rate_factor
from cogflow.training.step_checks import MAX_CONSECUTIVE_SKIPS, not_finite_message
from cogflow.training.step_monitor import StepMonitor, due

RESUME_HINT = "Run the same command again to resume."


def train(trainer: Trainer, checkpointer: Checkpointer, start: StartPoint) -> None:
    """Resume from ``start`` and train to ``stage.steps``; after a rollback resume from its checkpoint and continue.

    Collective.
    """
    context = trainer.context
    while True:
        checkpointer.resume(context, start)
        context.line = start_line(context, start)
        context.tracker.rewind(context.step)
        if context.step:
            echo(f"resuming {context.folder} after step {context.step}")
        try:
            trainer.run()
            return
        except RollbackRequested as rollback:
            start = rollback.start


def start_line(context: TrainingContext, start: StartPoint) -> int:
    """Begin the line of ``start``, where it has one; return the number of the line that is trained. Collective."""

    def begin_on_main() -> int:
        if start.line is None:
            return current_line(context.folder)
        line = begin(context.folder, start.line)
        context.tracker.begin_line(line)
        return line.number

    return ranks.run_on_main(begin_on_main)


class Trainer:
    """Runs training steps and the callbacks that are due after them.

    Only steps that are logged read from the device. DeepSpeed waits for the gradient norm at every step; nothing else
    waits.
    """

    def __init__(
        self,
        context: TrainingContext,
        batches: TrainingBatches,
        objective: Objective,
        monitor: StepMonitor,
        callbacks: Callbacks,
    ) -> None:
        self.context, self.stage = context, context.stage
        self.batches, self.objective, self.monitor, self.callbacks = batches, objective, monitor, callbacks
        self.engine, self.device = context.engine, objective.device
        self._sample_losses: list[torch.Tensor] = []

    def run(self) -> None:
        """Train from ``context.step`` to ``stage.steps``. Raises :class:`Stopped` when a signal asks for the end."""
        context, stage = self.context, self.stage
        self.callbacks.on_train_start(context)
        if context.step == 0 or context.pending:
            self.run_due_callbacks()
        with self.loader() as loader:
            while context.step < stage.steps:
                self.callbacks.on_step_start(context)
                update = self.train_step(context.step, loader)
                if not update.applied:
                    self.handle_skipped_update(update)
                context.step = update.step
                if update.applied and context.ema is not None:
                    context.ema.after_step(context.step, self.engine)
                context.stopping = context.step < stage.steps and context.stop_requested()
                self.callbacks.on_step_end(context, update)
                if context.stopping:
                    # Save at once and leave other due work to the resumed run: the time before a kill may be short.
                    self.callbacks.on_stop(context)
                    raise Stopped(
                        f"Stopped after step {context.step} of {stage.steps}; a checkpoint is saved.", RESUME_HINT
                    )
                self.run_due_callbacks()

    def train_step(self, step: int, loader: Loader) -> StepUpdate:
        """Run step ``step`` (from 0). A gradient that is not finite on any rank skips the update: no weight changes."""
        stage, monitor, name = self.stage, self.monitor, f"step {step + 1}"
        table = metric_table.empty(self.device)
        self._sample_losses = []
        applied = spike = False
        rate = learning_rate(step, stage) * rate_factor(self.context.rollbacks, step)
        checks_update = monitor.logs_step(step + 1)
        for micro in range(stage.gradient_accumulation):
            enter_phase(f"{name}: waiting for data")
            batch = loader.take(step, micro)
            enter_phase(f"{name}: forward")
            losses = self.objective.losses(batch)
            if self.objective.placement.counts:
                table += self.objective.metric_table(losses, batch)
            self._sample_losses.append(losses.per_sample.detach())
            enter_phase(f"{name}: backward")
            loader.start_prefetch()
            self.engine.backward(losses.mean)
            if micro == stage.gradient_accumulation - 1:
                # The log, the spike check and the spectra share this one collective.
                table = ranks.sum_over_ranks(table)
                spike = stage.on_spike == "skip" and monitor.is_loss_spike(table)
                if checks_update:
                    monitor.update_check.before_step()
            enter_phase(f"{name}: update")
            applied = self.engine.step(rate, skip=spike)
        return StepUpdate(
            step=step + 1,
            table=table,
            gradient_norm=self.engine.gradient_norm() if applied else math.inf,
            learning_rate=rate,
            applied=applied,
            spike=spike,
            unchanged=monitor.update_check.unchanged_by_step() if checks_update else None,
            data_wait=loader.take_waited(),
        )

    def handle_skipped_update(self, update: StepUpdate) -> None:
        """Call ``on_not_finite`` for a step that is not finite; an intended skip (a spike, fp16's search for its loss
        scale) passes.

        Raises :class:`QualityGateError` after MAX_CONSECUTIVE_SKIPS skipped updates in a row.
        """
        not_finite = [not bool(torch.isfinite(losses).all()) for losses in self._sample_losses]
        if update.spike or not (ranks.any_rank(any(not_finite)) or self.objective.dtype != torch.float16):
            return
        self.monitor.read(self.context)
        names = self._clip_names(update.step - 1, not_finite)
        message = not_finite_message(update.step, ranks.gather(names[:4]))
        if self.monitor.skipped.in_a_row + 1 >= MAX_CONSECUTIVE_SKIPS:
            raise QualityGateError(
                f"{message}. It is the {MAX_CONSECUTIVE_SKIPS}th skipped update in a row.",
                "Lower stage.learning_rate or check the data.",
            )
        self.callbacks.on_not_finite(self.context, message)

    def run_due_callbacks(self) -> None:
        """Evaluate, validate and save where that is due.

        The validation precedes the save, so that the checkpoint records its result.
        """
        context, stage, step = self.context, self.stage, self.context.step
        validates = due(step, stage.sample_every, stage.steps)
        states_before = CallbackStates(**self.callbacks.state_dict())
        if due(step, stage.evaluate_every, stage.steps):
            enter_phase(f"step {step}: held-out loss")
            self.callbacks.on_evaluate(context)
        if validates:
            enter_phase(f"step {step}: validation")
            try:
                self.callbacks.on_validate(context)
            except Interrupted:
                # The resumed run repeats the whole validation, the held-out losses included.
                self.callbacks.load_state_dict(states_before)
                self._stop_in_validation()
        if step > 0 and due(step, stage.weights_every, stage.steps):
            enter_phase(f"step {step}: saving weights")
            self.callbacks.on_save_weights(context)
        if step > 0 and (step == stage.steps or due(step, stage.save_every, stage.steps)):
            enter_phase(f"step {step}: saving")
            self.callbacks.on_save(context)

    def loader(self) -> Loader:
        """Return a loader of the training batches."""
        prefetch = self.context.config.speed.prefetch
        return Loader(self.batches.batch, self.stage.gradient_accumulation, self.device, prefetch)

    def _stop_in_validation(self) -> None:
        step = self.context.step
        if step > 0:
            self.callbacks.on_stop(self.context)
        saved = "a checkpoint is saved" if step > 0 else "nothing is trained yet"
        raise Stopped(
            f"Stopped in the validation after step {step} of {self.stage.steps}; {saved}.", RESUME_HINT
        ) from None

    def _clip_names(self, step: int, chosen: Sequence[bool]) -> list[str]:
        """Return the names of this rank's clips in the micro steps that ``chosen`` marks."""
        return [name for micro, wanted in enumerate(chosen) if wanted for name in self.batches.clip_names(step, micro)]
