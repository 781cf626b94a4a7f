"""Saves checkpoints when the training loop asks for them, and resumes training from one."""

from __future__ import annotations

from dataclasses import asdict

from cogflow.artifacts.run_layout import RunLayout
from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.data.latent_cache import LatentCache
from cogflow.records.training_records import CallbackStates, ModelIdentity, TrainedWith, TrainerRecord, ValidationRecord
from cogflow.training import checkpoint, retention
from cogflow.training.callback import Callback, Callbacks, TrainingContext
from cogflow.training.evaluation import Evaluation
from cogflow.training.rollback import StartPoint
from cogflow.training.run_identity import check_facts, run_identity, same_states, training_layout, tunable_settings


class Checkpointer(Callback):
    """Saves and loads checkpoints of one run, with the state of ``callbacks``."""

    def __init__(
        self,
        config: Config[TrainStage],
        cache: LatentCache,
        trained_with: TrainedWith,
        callbacks: Callbacks,
        evaluation: Evaluation,
    ) -> None:
        self.config, self.cache, self.trained_with = config, cache, trained_with
        self.callbacks, self.evaluation = callbacks, evaluation

    def resume(self, context: TrainingContext, start: StartPoint) -> None:
        """Load the checkpoint of ``start``, where there is one, and set the position of ``context``. Collective."""
        context.step = 0
        context.pending = False
        context.rollbacks = start.rollbacks
        if start.checkpoint is None or start.record is None:
            return
        record = start.record
        check_facts(record.trained_with, self.trained_with, start.checkpoint)
        same_layout = same_states(training_layout(self.config), record.layout)
        checkpoint.load(start.checkpoint, record, context.engine, context.ema, same_layout=same_layout)
        self.callbacks.load_state_dict(record.callbacks)
        context.step = record.step
        context.pending = record.pending

    def on_save(self, context: TrainingContext) -> None:
        """Publish a checkpoint and delete old ones. Collective."""
        self._save(context, pending=False)

    def on_stop(self, context: TrainingContext) -> None:
        """Publish a checkpoint whose due work is left to the resumed run. Collective."""
        self._save(context, pending=True)

    def on_save_weights(self, context: TrainingContext) -> None:
        """Publish the weights without optimizer states, for export. Collective."""
        record = self._record(context, pending=False)
        saved = checkpoint.save(RunLayout(context.folder).weights, record, context.engine, context.ema, states=False)
        self._log(context, saved, "checkpoint/weights")

    def _save(self, context: TrainingContext, *, pending: bool) -> None:
        folder = RunLayout(context.folder).checkpoints
        saved = checkpoint.save(folder, self._record(context, pending=pending), context.engine, context.ema)
        retention.remove_old(folder, context.stage, context.last_good_step)
        self._log(context, saved, "checkpoint")

    def _record(self, context: TrainingContext, *, pending: bool) -> TrainerRecord:
        outcome, ema = context.outcome, context.ema
        verdict = None
        if outcome is not None:
            verdict = ValidationRecord(
                step=outcome.step,
                level=outcome.level,
                score=outcome.score,
                message=outcome.message,
                defects=list(outcome.defects),
                heldout_loss=self.evaluation.loss_at(outcome.step),
            )
        return TrainerRecord(
            step=context.step,
            family=self.config.model.name,
            model=ModelIdentity(**asdict(self.config.model)),
            trained_with=self.trained_with,
            identity=run_identity(self.config, self.cache),
            layout=training_layout(self.config),
            settings=tunable_settings(context.stage),
            pending=pending,
            line=context.line,
            ema_updates=ema.updates if ema is not None else 0,
            validation=verdict,
            last_good_step=context.last_good_step,
            callbacks=CallbackStates(**self.callbacks.state_dict()),
        )

    def _log(self, context: TrainingContext, saved: checkpoint.SavedCheckpoint, prefix: str) -> None:
        values = {f"{prefix}/seconds": saved.seconds, f"{prefix}/gb": saved.bytes / 1e9}
        phases = {f"{prefix}/{phase}_seconds": seconds for phase, seconds in saved.phases.items()}
        context.tracker.log(context.step, values | phases)
