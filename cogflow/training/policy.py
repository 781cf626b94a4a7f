"""What an alarm over the samples leads to (``stage.on_blur`` = warn, stop or rollback), and a step that is not finite
(``stage.on_not_finite`` = stop, skip or rollback). All ranks decide alike, because rank 0 does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cogflow.artifacts.run_layout import RunLayout, step_folders, step_name, step_of
from cogflow.config.schema import TrainStage
from cogflow.errors import QualityGateError
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.training import rollback
from cogflow.training.retention import last_sharp
from cogflow.training.run_identity import changed
from cogflow.training.validation import Outcome


class GoBack(Exception):
    """Not an error: the loop, which stands after step ``start``, is to go on from ``path``, with ``rollbacks`` in force."""

    def __init__(self, start: int, path: Path, rollbacks: list[rollback.Rollback]) -> None:
        super().__init__(str(path))
        self.start, self.path, self.rollbacks = start, path, rollbacks


def act(
    outcome: Outcome | None, stage: TrainStage, folder: Path, quiet: int | None, save: Callable[[int], None]
) -> None:
    """Do what ``stage.on_blur`` says about an alarm; return when training goes on. Collective.

    Raises :class:`QualityGateError` (stop) with the last sharp checkpoint's path, or :class:`GoBack`.
    """
    if outcome is None or outcome.level != "alarm" or stage.on_blur == "warn":
        return
    sharp = ranks.broadcast(last_sharp(RunLayout(folder).checkpoints, quiet) if ranks.is_main() else None)
    if stage.on_blur == "stop" or sharp is None:
        save(outcome.step)
        where = RunLayout(folder).checkpoints / step_name(outcome.step)
        raise QualityGateError(
            f"Step {outcome.step}: {outcome.line}. A checkpoint is saved ({where}).",
            f"{_go_on(sharp)} Or go on from here with stage.on_blur=warn.",
        )
    _back(folder, stage, outcome.step, sharp, outcome.line)


def not_finite(
    step: int, line: str, stage: TrainStage, folder: Path, save: Callable[[int], None], warn: Callable[[str, str], None]
) -> None:
    """Do what ``stage.on_not_finite`` says of the step after ``step``, which changed nothing; return when training goes on. Collective.

    Raises :class:`QualityGateError` (stop) once a checkpoint of ``step`` is saved, or :class:`GoBack` to the newest checkpoint.
    """
    if stage.on_not_finite == "skip":
        warn("a step was left out", line)
        return
    newest: Path | None = ranks.broadcast(
        next(reversed(step_folders(RunLayout(folder).checkpoints)), None) if ranks.is_main() else None
    )
    if stage.on_not_finite == "rollback" and newest is not None:
        _back(folder, stage, step, newest, line)
    if step > 0 and (newest is None or step_of(newest) != step):
        save(step)
    raise QualityGateError(
        f"{line}. {'A checkpoint is saved' if step else 'Nothing was trained yet'}.",
        "Look at the clips, lower stage.learning_rate, or pass over such steps with stage.on_not_finite=skip.",
    )


def _back(folder: Path, stage: TrainStage, start: int, sharp: Path, line: str) -> None:
    """Set aside what came after ``sharp`` and raise: :class:`GoBack`, or :class:`QualityGateError` where going on is no use."""
    ratio = stage.rollback.learning_rate_ratio

    def work() -> tuple[str | None, list[rollback.Rollback]]:
        refused = rollback.may_go_on(stage.rollback, rollback.read(folder))
        return refused, rollback.go_back(folder, start, step_of(sharp), 1.0 if refused else ratio, line)

    refused, rollbacks = ranks.broadcast(work() if ranks.is_main() else None)
    aside = folder / rollback.ASIDE / f"{rollbacks[-1].number:02d}"
    if refused is not None:
        raise QualityGateError(
            f"Step {start}: {line}. The run is back at {sharp}; what came later is in {aside}. It stops there: {refused}.",
            "Lower stage.learning_rate, or give stage.rollback.learning_rate_ratio (such as 0.3), and run the command again.",
        )
    echo(
        f"warning: step {start}: {line}; going back to {sharp} with {ratio:g} of the learning rate; what came later is in {aside}"
    )
    raise GoBack(start, sharp, rollbacks)


def before_resuming(
    found: Path | None, trainer: dict[str, Any] | None, stage: TrainStage, folder: Path
) -> list[rollback.Rollback]:
    """The rollbacks that hold for a run that resumes ``found`` (``trainer``: its trainer.json). Collective.

    Raises :class:`QualityGateError` for a run that stands where an alarm stopped it and would only repeat itself or go on blurred, and
    :class:`GoBack` when it is to leave that place by ``stage.on_blur=rollback``; a checkpoint that is named (``stage.resume=PATH``) is
    taken as it is.
    """
    if found is None or trainer is None:
        if ranks.is_main():
            rollback.forget(folder)
        ranks.barrier()
        return []
    if stage.resume == "auto":
        _stays_stopped(found, trainer, stage, folder)
    rollbacks: list[rollback.Rollback] = ranks.broadcast(rollback.finish(folder) if ranks.is_main() else None)
    last = rollbacks[-1] if rollbacks else None
    if last is None or last.learning_rate_ratio != 1.0 or last.to != trainer["step"] or stage.on_blur != "rollback":
        return rollbacks
    if stage.rollback.learning_rate_ratio != 1.0 and len(rollbacks) <= stage.rollback.most:
        return ranks.broadcast(
            rollback.with_ratio(folder, stage.rollback.learning_rate_ratio) if ranks.is_main() else None
        )
    if not changed(trainer, stage):
        raise QualityGateError(
            f"This run went back to {found} after {last.reason} The same settings would repeat the same run.",
            "Lower stage.learning_rate, give stage.rollback.learning_rate_ratio (such as 0.3), or use stage.on_blur=warn.",
        )
    return rollbacks


def _stays_stopped(found: Path, trainer: dict[str, Any], stage: TrainStage, folder: Path) -> None:
    verdict = trainer.get("validation") or {}
    if stage.on_blur == "warn" or verdict.get("level") != "alarm" or verdict.get("step") != trainer["step"]:
        return
    sharp = ranks.broadcast(
        last_sharp(RunLayout(folder).checkpoints, trainer.get("quiet")) if ranks.is_main() else None
    )
    if stage.on_blur == "rollback" and sharp is not None:
        _back(folder, stage, int(trainer["step"]), sharp, str(verdict.get("line")))
    raise QualityGateError(
        f"The newest checkpoint {found} stands where an alarm stopped the run: {verdict.get('line')}.",
        f"{_go_on(sharp)} Or go on from there with stage.on_blur=warn.",
    )


def _go_on(sharp: Path | None) -> str:
    if sharp is None:
        return "No checkpoint is known to be sharp: start anew with stage.resume=never and a lower stage.learning_rate."
    return (
        f"The last sharp checkpoint is {sharp}: go on from it with stage.on_blur=rollback and a lower learning rate, such as "
        "stage.rollback.learning_rate_ratio=0.3."
    )
