"""Policies: act on an alarm over the samples (``stage.on_blur``) and on a step that is not finite.

The setting for such a step is ``stage.on_not_finite``.

All ranks act alike, because rank 0 decides.
"""

from __future__ import annotations

from pathlib import Path

from cogflow.artifacts.run_layout import RunLayout, step_folders, step_name, step_of
from cogflow.config.train_settings import TrainStage
from cogflow.errors import QualityGateError
from cogflow.records.training_records import RollbackEntry, TrainerRecord
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.training import rollback
from cogflow.training.callback import Callback, TrainingContext
from cogflow.training.checkpoint import read_trainer
from cogflow.training.checkpointer import Checkpointer
from cogflow.training.retention import last_sharp
from cogflow.training.rollback import RollbackRequested, StartPoint
from cogflow.training.run_identity import changed_settings

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
        sharp = ranks.run_on_main(lambda: last_sharp(checkpoints, context.last_good_step))
        if stage.on_blur == "stop" or sharp is None:
            self.checkpointer.on_save(context)
            raise QualityGateError(
                f"Step {outcome.step}: {outcome.message}. A checkpoint is saved "
                f"({checkpoints / step_name(outcome.step)}).",
                f"{resume_hint(sharp)} Or resume from here with stage.on_blur=warn.",
            )
        request_rollback(context.folder, stage, outcome.step, sharp, outcome.message)

    def on_not_finite(self, context: TrainingContext, message: str) -> None:
        """Act on a step after ``context.step`` that changed no weight; return when training continues. Collective.

        Raises :class:`QualityGateError` (stop) once ``context.step`` is saved, or :class:`RollbackRequested` to the
        newest checkpoint.
        """
        stage, step, folder = context.stage, context.step, context.folder
        if stage.on_not_finite == "skip":
            context.tracker.alert("an update was skipped", message)
            return
        newest = ranks.run_on_main(lambda: next(reversed(step_folders(RunLayout(folder).checkpoints)), None))
        if stage.on_not_finite == "rollback" and newest is not None:
            request_rollback(folder, stage, step, newest, message)
        if step > 0 and (newest is None or step_of(newest) != step):
            self.checkpointer.on_save(context)
        raise QualityGateError(
            f"{message}. {'A checkpoint is saved' if step else 'Nothing was trained yet'}.",
            "Check the clips, lower stage.learning_rate, or skip such updates with stage.on_not_finite=skip.",
        )


def request_rollback(folder: Path, stage: TrainStage, start: int, checkpoint: Path, reason: str) -> None:
    """Set aside the results after ``checkpoint`` and raise. Collective.

    Raises :class:`RollbackRequested`, or :class:`QualityGateError` when the same settings would only repeat the run.
    """
    ratio = stage.rollback.learning_rate_ratio

    def apply() -> tuple[str | None, list[RollbackEntry]]:
        refused = rollback.refusal(stage.rollback, rollback.read_rollbacks(folder))
        applied_ratio = 1.0 if refused else ratio
        return refused, rollback.roll_back(folder, start, step_of(checkpoint), applied_ratio, reason)

    refused, rollbacks = ranks.run_on_main(apply)
    aside = folder / rollback.SET_ASIDE / f"{rollbacks[-1].number:02d}"
    if refused is not None:
        raise QualityGateError(
            f"Step {start}: {reason}. The run is rolled back to {checkpoint}; what came later is in {aside}. It stops "
            f"there: {refused}.",
            f"Lower stage.learning_rate, or give {RATIO_HINT}, and run the command again.",
        )
    echo(
        f"warning: step {start}: {reason}; rolling back to {checkpoint} with {ratio:g} of the learning rate; what came "
        f"later is in {aside}"
    )
    raise RollbackRequested(StartPoint(checkpoint, read_trainer(checkpoint), rollbacks))


def choose_start(found: Path | None, stage: TrainStage, folder: Path) -> StartPoint:
    """Return where a run starts that would resume ``found``; a run that an alarm stopped may roll back first.

    Collective.

    Raises :class:`QualityGateError` for a run that an alarm stopped and that would repeat itself or continue blurred. A
    checkpoint that the user names (``stage.resume=PATH``) is taken as it is.
    """
    if found is None:
        ranks.run_on_main(lambda: rollback.forget_rollbacks(folder))
        return StartPoint(None, None, [])
    record = read_trainer(found)
    try:
        if stage.resume == "auto":
            _check_alarm(found, record, stage, folder)
        rollbacks = ranks.run_on_main(lambda: rollback.finish_rollback(folder))
        return StartPoint(found, record, _with_ratio(rollbacks, found, record, stage, folder))
    except RollbackRequested as requested:
        return requested.start


def _check_alarm(found: Path, record: TrainerRecord, stage: TrainStage, folder: Path) -> None:
    """Roll back or stop when the newest checkpoint is the one that an alarm stopped."""
    verdict = record.validation
    if stage.on_blur == "warn" or verdict is None or verdict.level != "alarm" or verdict.step != record.step:
        return
    sharp = ranks.run_on_main(lambda: last_sharp(RunLayout(folder).checkpoints, record.last_good_step))
    if stage.on_blur == "rollback" and sharp is not None:
        request_rollback(folder, stage, record.step, sharp, verdict.message)
    raise QualityGateError(
        f"An alarm stopped the run at its newest checkpoint {found}: {verdict.message}.",
        f"{resume_hint(sharp)} Or resume from there with stage.on_blur=warn.",
    )


def _with_ratio(
    rollbacks: list[RollbackEntry], found: Path, record: TrainerRecord, stage: TrainStage, folder: Path
) -> list[RollbackEntry]:
    """Give the last rollback, after which the run had stopped, the learning rate ratio that is configured now."""
    last = rollbacks[-1] if rollbacks else None
    if last is None or last.learning_rate_ratio != 1.0 or last.to != record.step or stage.on_blur != "rollback":
        return rollbacks
    ratio = stage.rollback.learning_rate_ratio
    if ratio != 1.0 and len(rollbacks) <= stage.rollback.most:
        return ranks.run_on_main(lambda: rollback.set_last_ratio(folder, ratio))
    if not changed_settings(record, stage):
        raise QualityGateError(
            f"This run was rolled back to {found} after: {last.reason}. The same settings would repeat the same run.",
            f"Lower stage.learning_rate, give {RATIO_HINT}, or use stage.on_blur=warn.",
        )
    return rollbacks


def resume_hint(sharp: Path | None) -> str:
    """Return the advice for a run that an alarm stopped. ``sharp``: its last sharp checkpoint."""
    if sharp is None:
        return (
            "No checkpoint is known to be sharp: start again with stage.resume=never and a lower stage.learning_rate."
        )
    return (
        f"The last sharp checkpoint is {sharp}: resume from it with stage.on_blur=rollback and a lower learning rate, "
        "such as "
        "stage.rollback.learning_rate_ratio=0.3."
    )
