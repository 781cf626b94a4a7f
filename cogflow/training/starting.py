"""Choose where a training starts: the checkpoint that it resumes, and whether a new line of the history begins."""

from __future__ import annotations

from pathlib import Path

from cogflow.artifacts.run_history import finish_line, has_results, point_at, restored_intervals
from cogflow.artifacts.run_layout import RunLayout, step_folders, step_name
from cogflow.config.command import options
from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.data.latent_cache import LatentCache
from cogflow.errors import CheckpointError, ConfigError, QualityGateError
from cogflow.files.paths import contained
from cogflow.files.record_io import JsonObject, JsonValue, read_record
from cogflow.records.history_records import REPLACED, HistoryRecord, RollbackEntry, read_history
from cogflow.records.run_records import StageRecord
from cogflow.records.training_records import TrainerRecord
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.training import checkpoint, retention
from cogflow.training.policy import RATIO_HINT, newest_sharp, request_rollback, resume_hint
from cogflow.training.rollback import RollbackRequested, StartPoint, line_settings, new_line, set_last_ratio
from cogflow.training.run_identity import changed_settings, check_same

NOT_COMPARED = ("stage.resume", "stage.plan", "stage.stall_minutes", "stage.changed_data", "data.holdout")
"""Settings of a finished run that another command may change without asking for another training."""


def find_start(config: Config[TrainStage], cache: LatentCache, folder: Path) -> StartPoint:
    """Return the checkpoint to resume from, checked against ``config``, and the rollbacks in force. Collective.

    Raises :class:`CheckpointError` for a checkpoint that cannot be resumed, and :class:`QualityGateError` for a run
    that an alarm stopped and that would repeat itself or continue blurred.
    """
    retention.sweep_all(RunLayout(folder).checkpoints)
    history: HistoryRecord = ranks.run_on_main(lambda: _complete_history(folder))
    start = _choose(config, folder, history)
    if start.record is not None:
        check_same(start.record, config, cache)
    return start


def check_finished(config: Config[TrainStage], start: StartPoint, folder: Path) -> bool:
    """Return whether the run has no step left to train.

    Raises :class:`ConfigError` when this command has other settings than those that the run was finished with, or no
    more steps than the checkpoint of another run that it starts from.
    """
    record, stage = start.record, config.stage
    if record is None or start.checkpoint is None or record.step < stage.steps:
        return False
    if start.line is not None:  # an older line may be brought back without training it further
        if record.step > stage.steps or not start.checkpoint.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{start.checkpoint} is at step {record.step} of stage.steps={stage.steps}: nothing is left to train.",
                f"Give more steps, such as stage.steps={2 * record.step}.",
            )
        return False
    different = ranks.run_on_main(lambda: _differences_to_finished(config, record, folder))
    if different:
        new_run = options({"run.name": f"{config.run.name}-2"})
        raise ConfigError(
            f"The run {config.run.name} is finished at step {record.step}, and this command has other settings:\n  "
            + "\n  ".join(different),
            f"Train with them in a new run: {new_run}, after stage=prepare with the same name. "
            f"stage.resume=never begins this run again and keeps its results in {folder / REPLACED}. "
            "A larger stage.steps continues it.",
        )
    return True


def _complete_history(folder: Path) -> HistoryRecord:
    finish_line(folder)
    return read_history(folder)


def _choose(config: Config[TrainStage], folder: Path, history: HistoryRecord) -> StartPoint:
    resume = config.stage.resume
    if resume == "auto":
        return _newest(config, folder, history)
    line = history.current
    if line.settings == line_settings(config):
        echo(f"this command began line {line.number} of the run ({line.began}); it continues that line")
        return _newest(config, folder, history)
    if resume == "never":
        return StartPoint(None, None, [], new_line(config, "stage.resume=never"))
    return _named(config, folder, history)


def _newest(config: Config[TrainStage], folder: Path, history: HistoryRecord) -> StartPoint:
    """Return the end of the current line. A run that an alarm stopped may roll back first."""
    paths = ranks.broadcast(step_folders(RunLayout(folder).checkpoints))
    found, damaged = checkpoint.newest_whole(paths)
    for text in damaged:
        echo(f"warning: checkpoint skipped: {text}")
    if found is None:
        if damaged:
            raise CheckpointError(
                f"No checkpoint of the run in {folder} is whole.",
                "Restore one from a copy, or begin again with stage.resume=never; the damaged ones are kept.",
            )
        return _line_start(config, folder, history)
    ranks.run_on_main(lambda: point_at(found))  # a kill may have come between the checkpoint and the pointer
    record = checkpoint.read_trainer(found)
    try:
        _check_alarm(config, found, record, folder)
    except RollbackRequested as requested:
        return requested.start
    line = history.current
    rollbacks = _with_ratio(line.rollbacks, found, record, config.stage, folder)
    reason = None
    if damaged:
        reason = f"later checkpoints are damaged: {damaged[0]}"
    elif changed := changed_settings(record, config.stage):
        reason = f"other settings: {', '.join(f'stage.{name}' for name in changed)}"
    if reason is None or not ranks.run_on_main(lambda: has_results(folder, record.step)):
        return StartPoint(found, record, rollbacks)
    name = str(found.relative_to(folder))
    begun = new_line(config, reason, from_step=record.step, checkpoint=name, kept=record.step, rollbacks=rollbacks)
    return StartPoint(found, record, rollbacks, begun)


def _line_start(config: Config[TrainStage], folder: Path, history: HistoryRecord) -> StartPoint:
    """Return the start of a line that has no checkpoint yet."""
    line = history.current
    if line.checkpoint is not None:
        named = Path(line.checkpoint)
        path = checkpoint.open_named(str(named if named.is_absolute() else contained(folder, line.checkpoint)))
        return StartPoint(path, checkpoint.read_trainer(path), line.rollbacks)
    if not ranks.run_on_main(lambda: has_results(folder)):
        # Nothing is trained yet: the line is the one that this command begins.
        return StartPoint(None, None, [], new_line(config, "new run")) if not line.began else StartPoint(None, None, [])
    if line.settings and line.settings != line_settings(config):
        return StartPoint(None, None, [], new_line(config, "other settings, before the first checkpoint"))
    return StartPoint(None, None, [])


def _named(config: Config[TrainStage], folder: Path, history: HistoryRecord) -> StartPoint:
    """Return the start from the checkpoint that ``stage.resume=PATH`` names, which is taken as it is."""
    path = checkpoint.open_named(config.stage.resume)
    record = checkpoint.read_trainer(path)
    step, reason = record.step, f"stage.resume={config.stage.resume}"
    real, run = path.resolve(), folder.resolve()
    if not real.is_relative_to(run):
        line = new_line(config, reason, from_step=step, checkpoint=str(real))
        return StartPoint(path, record, [], line)
    name = real.relative_to(run).as_posix()
    if name == f"checkpoints/{step_name(step)}":
        rollbacks, kept = history.current.rollbacks, step
        if not ranks.run_on_main(lambda: has_results(folder, step)):
            return StartPoint(path, record, rollbacks)
    else:
        former = history.line(record.line)
        rollbacks = former.rollbacks if former is not None else []
        intervals = restored_intervals(history, folder, name, step)
        kept = intervals[-1].low if intervals else -1
    line = new_line(config, reason, from_step=step, checkpoint=name, kept=kept, rollbacks=rollbacks)
    return StartPoint(path, record, rollbacks, line)


def _check_alarm(config: Config[TrainStage], found: Path, record: TrainerRecord, folder: Path) -> None:
    """Roll back or stop when the newest checkpoint is the one that an alarm stopped."""
    stage, verdict = config.stage, record.validation
    if stage.on_blur == "warn" or verdict is None or verdict.level != "alarm" or verdict.step != record.step:
        return
    sharp = newest_sharp(RunLayout(folder).checkpoints, record.last_good_step)
    if stage.on_blur == "rollback" and sharp is not None:
        request_rollback(config, folder, record.step, sharp, verdict.message)
    raise QualityGateError(
        f"An alarm stopped the run at its newest checkpoint {found}: {verdict.message}.",
        resume_hint(sharp),
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
        return ranks.run_on_main(lambda: set_last_ratio(folder, ratio))
    if not changed_settings(record, stage):
        raise QualityGateError(
            f"This run was rolled back to {found} after: {last.reason}. The same settings would repeat the same run.",
            f"Lower stage.learning_rate, give {RATIO_HINT}, or use stage.on_blur=warn.",
        )
    return rollbacks


def _differences_to_finished(config: Config[TrainStage], record: TrainerRecord, folder: Path) -> list[str]:
    """Return the settings of this command that differ from those that the run was finished with, with both values."""
    if record.step != config.stage.steps:
        return [f"stage.steps: {record.step} then, {config.stage.steps} now"]
    then, now = closing_settings(folder, record.step), _flat(line_settings(config))
    return [
        f"{name}: {then[name]} then, {now[name]} now"
        for name in now
        if name in then and then[name] != now[name] and name not in NOT_COMPARED
    ]


def closing_settings(folder: Path, step: int) -> dict[str, JsonValue]:
    """Return the settings of the training that finished at ``step``, by dotted name, from ``train.json``.

    Empty when it was killed between its last checkpoint and this record.
    """
    path = folder / "train.json"
    settings = _flat(read_record(path, StageRecord).settings) if path.is_file() else {}
    return settings if settings.get("stage.steps") == step else {}


def _flat(values: JsonObject, prefix: str = "") -> dict[str, JsonValue]:
    """Return the values of nested objects by dotted name."""
    flat: dict[str, JsonValue] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
