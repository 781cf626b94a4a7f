"""Going back to the last sharp checkpoint: what came after it is set aside, and other settings hold from there on.

``<run>/rollback.json`` lists every time a run went back: from where, to where, why, with which settings. The learning rate of a step is a
function of that list and of the step, so a run resumed later trains exactly as one that never stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cogflow.artifacts.run_layout import step_folders, step_of
from cogflow.config.schema import RollbackConfig
from cogflow.errors import CheckpointError
from cogflow.files.atomic_write import write_json
from cogflow.tracking.metrics_log import EVENTS, METRICS, read_metrics, write_metrics

FILE = "rollback.json"
ASIDE = "rolled-back"


@dataclass(frozen=True)
class Rollback:
    """``start``: the step at whose validation the alarm came; ``to``: of the sharp checkpoint; ``learning_rate_ratio``: on top of those
    before; 1 when nothing was given and the run stopped there. ``moved``: whether what came later is set aside."""

    number: int
    start: int
    to: int
    learning_rate_ratio: float
    reason: str
    moved: bool = False


def read(folder: Path) -> list[Rollback]:
    """The rollbacks of the run in ``folder``, in order. Raises :class:`CheckpointError` for a file that is not ours."""
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        return [Rollback(**entry) for entry in json.loads(path.read_text())["rollbacks"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}",
            "It says which learning rate holds; restore it, or start anew with stage.resume=never.",
        ) from error


def write(folder: Path, rollbacks: Sequence[Rollback]) -> None:
    write_json(folder / FILE, {"rollbacks": [asdict(rollback) for rollback in rollbacks]})


def rate_factor(rollbacks: Sequence[Rollback], step: int) -> float:
    """What the learning rate of step ``step`` (from 0) is multiplied by."""
    factor = 1.0
    for rollback in rollbacks:
        if step >= rollback.to:
            factor *= rollback.learning_rate_ratio
    return factor


def may_go_on(settings: RollbackConfig, rollbacks: Sequence[Rollback]) -> str | None:
    """``None``, or why a run that has gone back so often must stop now."""
    if settings.learning_rate_ratio == 1.0:
        return "no other settings are given, and the same settings would repeat the same run"
    if len(rollbacks) >= settings.most:
        return f"it went back {len(rollbacks)} times already, and stage.rollback.most={settings.most}"
    return None


def go_back(folder: Path, start: int, to: int, ratio: float, reason: str) -> list[Rollback]:
    """Note a rollback and set aside what came after ``to``. A kill at any moment is mended by :func:`finish`. Rank 0 only."""
    rollbacks = read(folder)
    write(folder, [*rollbacks, Rollback(len(rollbacks) + 1, start, to, ratio, reason)])
    return finish(folder)


def finish(folder: Path) -> list[Rollback]:
    """Set aside what a noted rollback still has to; the rollbacks. Rank 0 only."""
    rollbacks = read(folder)
    if rollbacks and not rollbacks[-1].moved:
        last = rollbacks[-1]
        set_aside(folder, folder / ASIDE / f"{last.number:02d}", last.to)
        rollbacks[-1] = Rollback(**{**asdict(last), "moved": True})
        write(folder, rollbacks)
    return rollbacks


def forget(folder: Path) -> None:
    """A run that starts anew is bound by no rollback: its file goes beside what was set aside. Rank 0 only."""
    path = folder / FILE
    if path.is_file():
        target = folder / ASIDE / f"{FILE.removesuffix('.json')}-{len(list((folder / ASIDE).glob('*.json'))) + 1}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def with_ratio(folder: Path, ratio: float) -> list[Rollback]:
    """Give the last rollback, after which the run had stopped, the settings it is to go on with. Rank 0 only."""
    rollbacks = read(folder)
    rollbacks[-1] = Rollback(**{**asdict(rollbacks[-1]), "learning_rate_ratio": ratio})
    write(folder, rollbacks)
    return rollbacks


def set_aside(folder: Path, target: Path, step: int) -> None:
    """Move checkpoints and samples beyond ``step`` into ``target``, and copy the lines of metrics that will be rewound."""
    target.mkdir(parents=True, exist_ok=True)
    lines = [line for line in read_metrics(folder / METRICS) if line.is_training and line.step > step]
    if lines:
        write_metrics(target / METRICS, lines)
    if (folder / EVENTS).is_file():
        shutil.copyfile(folder / EVENTS, target / EVENTS)
    for kind in ("checkpoints", "samples"):
        for path in step_folders(folder / kind):
            if step_of(path) > step:
                (target / kind).mkdir(exist_ok=True)
                path.rename(target / kind / path.name)
