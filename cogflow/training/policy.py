"""Policies: act on an alarm over the samples (``stage.on_blur``) and on a step that is not finite.

The setting for such a step is ``stage.on_not_finite``.

All ranks act alike, because rank 0 decides.
"""

from __future__ import annotations

from pathlib import Path

from cogflow.artifacts.run_layout import RunLayout, step_folders, step_name, step_of
from cogflow.config.command import repeated
from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.errors import QualityGateError
from cogflow.records.history_records import RollbackEntry, RunLine, read_history
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.training.callback import Callback, TrainingContext
from cogflow.training.checkpoint import newest_whole, read_trainer
from cogflow.training.checkpointer import Checkpointer
from cogflow.training.retention import sharp_checkpoints
from cogflow.training.rollback import RollbackRequested, StartPoint, begin, new_line, refusal

RATIO_HINT = "stage.rollback.learning_rate_ratio (such as 0.3)"


class QualityPolicy(Callback):
    """Acts on alarms and on steps that are not finite, as ``stage.on_blur`` and ``stage.on_not_finite`` say."""

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer

    def on_validate(self, context: TrainingContext) -> None:
        """Act on an alarm of this step's validation; return when training continues. Collective.

        Raises :class:`QualityGateError` (stop) with the path of the last sharp checkpoint, or
        :class:`RollbackRequested`.
        """
        stage, outcome = context.stage, context.outcome
        if outcome is None or outcome.step != context.step or outcome.level != "alarm" or stage.on_blur == "warn":
            return
        checkpoints = RunLayout(context.folder).checkpoints
        sharp = newest_sharp(checkpoints, context.last_good_step)
        if stage.on_blur == "stop" or sharp is None:
            self.checkpointer.on_save(context)
            raise QualityGateError(
                f"Step {outcome.step}: {outcome.message}. A checkpoint is saved "
                f"({checkpoints / step_name(outcome.step)}).",
                resume_hint(sharp),
            )
        request_rollback(context.config, context.folder, outcome.step, sharp, outcome.message)

    def on_not_finite(self, context: TrainingContext, message: str) -> None:
        """Act on a step after ``context.step`` that changed no weight; return when training continues. Collective.

        Raises :class:`QualityGateError` (stop) once ``context.step`` is saved, or :class:`RollbackRequested` to the
        newest checkpoint.
        """
        stage, step, folder = context.stage, context.step, context.folder
        if stage.on_not_finite == "skip":
            context.tracker.alert("an update was skipped", message)
            return
        newest, _ = newest_whole(ranks.broadcast(step_folders(RunLayout(folder).checkpoints)))
        if stage.on_not_finite == "rollback" and newest is not None:
            request_rollback(context.config, folder, step, newest, message)
        if step > 0 and (newest is None or step_of(newest) != step):
            self.checkpointer.on_save(context)
        raise QualityGateError(
            f"{message}. {'A checkpoint is saved' if step else 'Nothing was trained yet'}.",
            "Check the clips, lower stage.learning_rate, or skip such updates with stage.on_not_finite=skip.",
        )


def newest_sharp(checkpoints: Path, last_good_step: int | None) -> Path | None:
    """Return the newest checkpoint that is sharp and whole, or ``None``. Collective."""
    return newest_whole(ranks.broadcast(sharp_checkpoints(checkpoints, last_good_step)))[0]


def request_rollback(config: Config[TrainStage], folder: Path, start: int, checkpoint: Path, reason: str) -> None:
    """Return to the verified ``checkpoint`` after an alarm at step ``start``. Collective.

    Raises :class:`RollbackRequested`, or :class:`QualityGateError` when the same settings would only repeat the run.
    """
    stage = config.stage
    ratio = stage.rollback.learning_rate_ratio
    to = step_of(checkpoint)

    def next_line(applied_ratio: float) -> RunLine:
        rollbacks = [*read_history(folder).current.rollbacks, RollbackEntry(start, to, applied_ratio, reason)]
        name = str(checkpoint.relative_to(folder))
        why = f"rollback after step {start}: {reason}"
        return new_line(config, why, from_step=to, checkpoint=name, kept=to, rollbacks=rollbacks)

    def decide() -> tuple[str | None, RunLine]:
        refused = refusal(stage.rollback, read_history(folder).current.rollbacks)
        return (refused, begin(folder, next_line(1.0))) if refused else (None, next_line(ratio))

    refused, line = ranks.run_on_main(decide)
    if refused is not None:
        raise QualityGateError(
            f"Step {start}: {reason}. The run is rolled back to {checkpoint}; what came later is in "
            f"{folder / (line.replaced or '')}. It stops there: {refused}.",
            f"Lower stage.learning_rate, or give {RATIO_HINT}, and run the command again.",
        )
    echo(f"warning: step {start}: {reason}; rolling back to {checkpoint} with {ratio:g} of the learning rate")
    raise RollbackRequested(StartPoint(checkpoint, read_trainer(checkpoint), line.rollbacks, line))


def resume_hint(sharp: Path | None) -> str:
    """Return the advice for a run that an alarm stopped. ``sharp``: its last sharp checkpoint."""
    onwards = f"To resume from the newest checkpoint all the same: {repeated({'stage.on_blur': 'warn'})}"
    if sharp is None:
        return (
            "No checkpoint is known to be sharp: start again with stage.resume=never and a lower stage.learning_rate.\n"
            f"{onwards}"
        )
    return (
        f"The last sharp checkpoint is {sharp}. To resume from it with a lower learning rate: "
        f"{repeated({'stage.on_blur': 'rollback', 'stage.rollback.learning_rate_ratio': 0.3})}\n{onwards}"
    )
