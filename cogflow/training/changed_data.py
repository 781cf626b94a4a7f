"""Refuse to train on prepared clips that are not those of the user's folder, unless the user asks for them.

Two things can differ: ``data.path`` from the prepared clips, and the prepared clips from those that a checkpoint was
trained on. ``stage.changed_data=use_prepared`` goes on with the clips that were prepared for the run.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cogflow.artifacts.run_layout import RunLayout, step_folders
from cogflow.config.command import command_of, override
from cogflow.config.config import AnyConfig, Config
from cogflow.config.train_settings import TrainStage
from cogflow.data.data_changes import compare_indexes
from cogflow.data.folder_comparison import FolderComparison, compare_with_folder
from cogflow.data.former_index import read_former
from cogflow.data.latent_cache import LatentCache
from cogflow.data.shapes import drawing_differences
from cogflow.errors import CheckpointError, DataError, UserError, format_list
from cogflow.files.paths import run_folder
from cogflow.files.record_io import read_record
from cogflow.records.run_records import StageRecord
from cogflow.records.training_records import TrainerRecord
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.runtime.progress import progress

USE_PREPARED = "use_prepared"
"""Value of ``stage.changed_data`` that goes on with the prepared clips."""


def check_data(config: Config[TrainStage], cache: LatentCache) -> str:
    """Compare ``data.path`` with the prepared clips, and report what was compared. Collective; rank 0 works.

    Returns the changes that ``stage.changed_data`` allows, as text; an empty string without any. Drawn clips are not
    compared; only their settings are. Raises :class:`DataError` when clips or captions changed and
    ``stage.changed_data`` does not allow it.
    """
    data = config.data
    for line in effect_notes(config, cache):
        echo(f"warning: {line}")
    if data.name == "shapes" or data.path is None:
        folder = Path(data.path).expanduser() if data.path else run_folder(config.run) / "data"
        if different := ranks.run_on_main(lambda: drawing_differences(folder, data)):
            echo(
                f"warning: the prepared clips were drawn with other settings: {'; '.join(different)}. Training uses "
                "them as they are; stage=prepare draws new ones"
            )
        return ""
    comparison: FolderComparison = ranks.run_on_main(
        lambda: compare_with_folder(cache.index, cache.folder, data, progress)
    )
    echo(comparison.summary)
    lines = comparison.changes.lines()
    if not lines:
        return ""
    if config.stage.changed_data == USE_PREPARED:
        return (
            f"{data.path} is not as it was prepared; training uses the prepared clips "
            f"(stage.changed_data={USE_PREPARED}):\n{format_list(lines)}"
        )
    raise DataError(
        f"Clips or captions in {data.path} are not those that were prepared for this run:\n{format_list(lines)}",
        choices(config),
    )


def effect_notes(config: Config[TrainStage], cache: LatentCache) -> list[str]:
    """Return a line for each setting that has no effect on training with these clips, and for batches that hold a clip
    more than once.
    """
    notes = []
    asked, prepared = config.data.holdout, cache.settings.holdout
    if asked is not None and prepared is not None and asked != prepared:
        notes.append(
            f"data.holdout={asked} has no effect on training: {len(cache.holdout)} clips were held out when the clips "
            f"were prepared (data.holdout={prepared}); stage=prepare changes it"
        )
    if config.stage.evaluate_every and not cache.holdout:
        notes.append(
            f"no clip is held out: stage.evaluate_every={config.stage.evaluate_every} has no effect, and overfitting "
            "is not noticed"
        )
    size = config.stage.batch_size
    for group in cache.groups or [cache.train]:
        if 0 < len(group) < size:
            bucket = cache.bucket(group[0])
            where = f"the bucket {bucket} has" if bucket else "there are"
            notes.append(
                f"{where} {len(group)} clips to train on, fewer than stage.batch_size={size}: a batch holds some of "
                "them more than once"
            )
    return notes


def trained_data_changes(record: TrainerRecord, config: Config[TrainStage], cache: LatentCache) -> list[str]:
    """Return lines on how the prepared clips differ from those that the checkpoint was trained on; empty when they are
    the same.

    ``stage.changed_data=use_prepared`` switches ``cache`` to the clips that it was trained on, where they are kept.
    """
    trained_on = str(record.identity.get("data"))
    if trained_on == cache.fingerprint:
        return []
    if config.stage.changed_data == USE_PREPARED and cache.use_former(trained_on):
        echo(
            f"note: training continues on the clips that step {record.step} was trained on, and not on those that were "
            f"prepared since (stage.changed_data={USE_PREPARED})"
        )
        return []
    former = read_former(cache.folder, trained_on)
    if former is None:
        return ["other clips or captions; the list of those that the checkpoint was trained on is not in this run"]
    return compare_indexes(former, cache.index).lines()


def changed_data_error(
    record: TrainerRecord, config: Config[TrainStage], cache: LatentCache, changes: list[str]
) -> CheckpointError:
    """Return the error for a checkpoint that was trained on other clips, with the commands for both ways to go on."""
    is_kept = read_former(cache.folder, str(record.identity.get("data"))) is not None
    return CheckpointError(
        f"The prepared clips are not those that the checkpoint of step {record.step} was trained on:\n"
        + format_list(changes),
        choices(config, can_go_on=is_kept),
    )


def choices(config: Config[TrainStage], *, can_go_on: bool = True) -> str:
    """Return the commands that go on with the prepared clips, and that start a new run on the present ones.

    ``can_go_on``: False where the clips that the checkpoint was trained on are no longer in this run.
    """
    words = own_words(config)
    flow = "stage=flow" in words
    prefix = "stage.train." if flow else "stage."
    lines = []
    if can_go_on:
        as_it_is = _with(words, {f"{prefix}changed_data": USE_PREPARED})
        lines += ["To go on with the clips that were prepared for this training:", f"  {command_of(as_it_is)}"]
    checkpoint = _resumed_checkpoint(config)
    if checkpoint is None:
        lines.append("To train on the clips as they are now:")
        name, fresh = config.run.name, _without(words, f"{prefix}changed_data")
    else:
        lines.append("To start a new run on the clips as they are now, from the newest weights of this one:")
        name = _free_name(config)
        dropped = [f"{prefix}{key}" for key in ("resume", "start", "start_kind", "changed_data")]
        fresh = _with(_without(words, *dropped), {"run.name": name, f"{prefix}start": str(checkpoint)})
    if not flow:  # it prepares the clips itself
        lines.append(f"  {command_of(_prepare_words(config, words, name))}")
    return "\n  ".join([*lines, f"  {command_of(fresh)}"])


def _resumed_checkpoint(config: Config[TrainStage]) -> Path | None:
    """Return the checkpoint that ``stage.resume`` names, else the newest of the run."""
    if config.stage.resume not in ("auto", "never"):
        return Path(config.stage.resume)
    return next(reversed(step_folders(RunLayout(run_folder(config.run)).checkpoints)), None)


def own_words(config: AnyConfig) -> list[str]:
    """Return the words of this process's command; those that name stage and run where it is no command of cogflow."""
    words = sys.argv[1:]
    if any(word.startswith("stage=") for word in words):
        return words
    return [f"stage={config.stage.name}", override("run.root", config.run.root), override("run.name", config.run.name)]


def _prepare_words(config: AnyConfig, words: Sequence[str], name: str) -> list[str]:
    """Return the words that prepare the present clips for the run ``name``: those that prepared this run, else those of
    this command without its stage's settings.
    """
    try:
        recorded = shlex.split(read_record(run_folder(config.run) / "prepare.json", StageRecord).command)
    except (UserError, ValueError):
        recorded = []
    if "stage=prepare" in recorded:
        first = next(index for index, word in enumerate(recorded) if "=" in word)
        kept = recorded[first:]
    else:
        kept = ["stage=prepare", *(word for word in words if not word.startswith(("stage.", "stage=")))]
    path = {"data.path": config.data.path} if config.data.path is not None else {}
    return _with(kept, {"run.root": config.run.root, "run.name": name, **path})


def _with(words: Sequence[str], values: dict[str, str]) -> list[str]:
    """Return ``words`` with the settings ``values``, each at the place of its former value or at the end."""
    kept = [override(key, values[key]) if (key := word.split("=", 1)[0]) in values else word for word in words]
    given = {word.split("=", 1)[0] for word in kept}
    return list(dict.fromkeys([*kept, *(override(key, value) for key, value in values.items() if key not in given)]))


def _without(words: Sequence[str], *keys: str) -> list[str]:
    return [word for word in words if word.split("=", 1)[0] not in keys]


def _free_name(config: AnyConfig) -> str:
    """Return a name for a new run beside the run of ``config``."""
    root, name = Path(config.run.root).expanduser(), config.run.name
    number = 2
    while (root / f"{name}-{number}").exists():
        number += 1
    return f"{name}-{number}"
