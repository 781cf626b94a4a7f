"""Choose the run that a command works in, so that it writes into no other run.

:func:`choose_run` is the only place that decides this:

1. A command that names ``run.name`` works in ``<run.root>/<run.name>``.
2. A command whose path is a run, or is in one (a checkpoint, samples, an export, a pipeline), works in that run.
   :data:`cogflow.config.command.RUN_FROM_PATH` lists the settings that this is true of.
3. A command with any other path, or with a run that cannot be written, works in a run of its own:
   ``<run.root>/<name of the path>-<stage>``. The same path gives the same run. ``source.json`` in it holds the path,
   and another path of the same name gets a run whose name ends with a part of its hash.
4. A command without a path works in ``<run.root>/<run.name>`` with the default name.

A command that gives ``run.root`` on its command line works inside that folder, also when its path is in a run
elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cogflow import rank_identity
from cogflow.artifacts.run_layout import SAMPLES_RECORD, TRAINER, RunLayout, step_folders
from cogflow.config.command import RUN_FROM_PATH
from cogflow.config.compose import ComposedCommand
from cogflow.config.config import STAGES, AnyConfig
from cogflow.config.run_section import FOLDER_NAME, RunConfig, run_at
from cogflow.errors import CogflowError
from cogflow.files.atomic_write import write_first
from cogflow.files.bounded_parsing import read_json_object
from cogflow.files.contained_files import open_regular
from cogflow.files.paths import run_folder
from cogflow.files.printable import one_line
from cogflow.files.record_io import read_record, record_values
from cogflow.records.cache_records import CacheIndex
from cogflow.records.run_records import RunSource, StageRecord

FAULTS = "cogflow.log"
"""File of a run with the tracebacks of unexpected errors."""
HISTORY = "history.json"
ASIDE = ("replaced", "rolled-back")
"""Folders of a run that hold results of replaced lines. Their subfolders look like runs and belong to the run."""
NOT_TELLING = re.compile(
    r"(step-)?\d+(-ema)?|transformer|vae|text_encoder|export|exported|pipeline|checkpoints?|ckpts?|weights|samples|ema"
    r"|sampled|repaired|latest|deepspeed|output|mp_rank_\d+_model_states|pytorch_model",
    re.IGNORECASE,
)
"""Names of files and folders that do not tell sources apart: the name of the folder around them is put before them."""
SUFFIXES = (".pt", ".bin", ".pth", ".safetensors", ".mp4", ".mov", ".webm", ".mkv", ".png", ".jpg", ".jpeg")
MOST_BYTES = 120
"""Bytes of a source's name that the name of its run takes; file systems allow 255."""
HEAD_BYTES = 4096
"""Bytes of a latent cache's index that show whether it is one."""


@dataclass(frozen=True)
class WorkingRun:
    """The run that a command works in.

    ``why``: a clause for the user; empty when the command names the run or no path. ``source``: resolved path that the
    run is made for, when it is a run of the command's own. ``stage``: name of the command's stage.
    """

    run: RunConfig
    stage: str
    why: str = ""
    source: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder of the run. It need not exist."""
        return run_folder(self.run)

    @property
    def line(self) -> str:
        """The line that the command prints; empty when the user chose the run."""
        return f"working in {self.folder}: {self.why}" if self.why else ""


def choose_run(command: ComposedCommand) -> WorkingRun:
    """Return the run that ``command`` works in. Nothing is written."""
    config = command.config
    stage = config.stage.name
    as_configured = WorkingRun(config.run, stage)
    paths = {key: getattr(config.stage, key.removeprefix("stage.")) for key in RUN_FROM_PATH.get(stage, ())}
    given = {key: Path(path).expanduser() for key, path in paths.items() if path}
    missing = [path for key, path in given.items() if key != "stage.output" and not path.exists()]
    if "run.name" in command.named or not given or missing:  # the stage refuses a path that is missing
        return as_configured
    root = Path(config.run.root).expanduser() if "run.root" in command.given else None
    refused = ""
    for key, path in given.items():
        found = enclosing_run(path)
        if found is None:
            continue
        if refusal := _refusal(found, root):
            refused = refused or f"{key}={path} is in the run {found}, {refusal}"
            continue
        where = "is this run" if _same(found, path) else "is in it"
        return WorkingRun(_run_at(found, config), stage, f"{key}={path} {where}")
    key, path = next(iter(given.items()))
    if key == "stage.output":  # without a source the stage reads the default run
        return as_configured
    why = refused or f"{key}={path} is in no run, so that it gets one of its own"
    source = path.resolve()
    return WorkingRun(_own_run(config, stage, source), stage, f"{why} (run.name=NAME chooses another)", source)


def enclosing_run(path: Path) -> Path | None:
    """Return the run that ``path`` is, or that contains it; ``None`` when there is none.

    The result is relative to the working folder when ``path`` is relative and the run is below the working folder.
    """
    named = Path(os.path.normpath(path.expanduser().absolute()))
    for start in dict.fromkeys((named, named.resolve())):
        found = next((folder for folder in (start, *start.parents) if is_run(folder)), None)
        if found is not None:
            if found.parent.name in ASIDE and is_run(found.parent.parent):
                found = found.parent.parent
            here = Path.cwd()
            below = not path.is_absolute() and found != here and found.is_relative_to(here)
            return found.relative_to(here) if below else found
    return None


def is_run(folder: Path) -> bool:
    """Return whether ``folder`` is a run, by the files that cogflow's stages write into one."""
    if not folder.is_dir():
        return False
    layout = RunLayout(folder)
    with suppress(OSError):
        if any((folder / f"{name}.json").is_file() and _is_stage_record(folder, name) for name in STAGES):
            return True
        if (folder / RunSource.file_name).is_file() and _source_of(folder) is not None:
            return True
        if isinstance(read_json_object(folder / HISTORY).get("lines"), list):
            return True
        steps = [*step_folders(layout.checkpoints), *step_folders(layout.weights)]
        if any((step / TRAINER).is_file() for step in steps):
            return True
        if any((step / SAMPLES_RECORD).is_file() for step in step_folders(layout.samples)):
            return True
        return _is_latent_cache(layout.cache)
    return False


@contextmanager
def working_in(chosen: WorkingRun) -> Iterator[WorkingRun]:
    """Mark a run that is made for one source, as long as it contains anything; yield the run to work in.

    It differs from ``chosen`` when another command has taken that folder for another source in between. Only the first
    rank writes.
    """
    if chosen.source is None or rank_identity.rank() != 0:
        yield chosen
        return
    had_root = chosen.folder.parent.is_dir()
    marked = _mark(chosen, chosen.source)
    try:
        yield marked
    finally:
        _remove_if_unused(marked.folder)
        if not had_root:
            with suppress(OSError):
                marked.folder.parent.rmdir()  # empty


def _refusal(run: Path, root: Path | None) -> str:
    """Return why a command cannot work in ``run``, a clause; empty when it can. ``root``: the given ``run.root``."""
    if root is not None and not _same(run.absolute().parent, root):
        return "which is not in run.root"
    if not os.access(run, os.W_OK | os.X_OK):
        return "which cannot be written"
    if FOLDER_NAME.problem(run.absolute().name):
        return "whose name run.name cannot have"
    return ""


def _run_at(folder: Path, config: AnyConfig) -> RunConfig:
    if _same(folder, run_folder(config.run)):
        return config.run
    return run_at(folder)


def _own_run(config: AnyConfig, stage: str, source: Path) -> RunConfig:
    """Return the run of ``source``: one that is marked with it, else the first name that is free."""
    sha256 = hashlib.sha256(os.fsencode(source)).hexdigest()
    plain = f"{_telling_name(source)}-{stage}"
    runs = [replace(config.run, name=name) for name in (plain, *(f"{plain}-{sha256[:size]}" for size in (8, 32)))]
    marked = next((run for run in runs if _source_of(run_folder(run)) == str(source)), None)
    return marked or next((run for run in runs[:-1] if _is_free(run_folder(run))), runs[-1])


def _telling_name(source: Path) -> str:
    """Return a name for the run of ``source`` that ``run.name`` can have."""
    own = source.name.removesuffix(source.suffix) if source.suffix.lower() in SUFFIXES else source.name
    if NOT_TELLING.fullmatch(own):
        around = [parent.name for parent in source.parents if not NOT_TELLING.fullmatch(parent.name)]
        own = f"{around[0]}-{own}" if around and around[0] else own
    text = "".join("-" if letter == "/" or one_line(letter) != letter else letter for letter in own).strip(" .")
    short = text.encode("utf-8", "replace")[:MOST_BYTES].decode("utf-8", "ignore").strip(" .")
    if not short or FOLDER_NAME.problem(short):
        return "source"
    return short


def _is_free(folder: Path) -> bool:
    """Return whether a run can be made at ``folder``: nothing is there, or no more than the log of a failure."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    return {path.name for path in folder.iterdir()} <= {FAULTS}


def _mark(chosen: WorkingRun, source: Path) -> WorkingRun:
    path = chosen.folder / RunSource.file_name
    if not path.is_file():
        record = record_values(RunSource(chosen.stage, str(source)))
        write_first(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    found = _source_of(chosen.folder)
    if found is None or found == str(source):
        return chosen
    suffix = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]
    return _mark(replace(chosen, run=replace(chosen.run, name=f"{chosen.run.name}-{suffix}")), source)


def _remove_if_unused(folder: Path) -> None:
    """Remove a run in which a command left nothing, such as one that failed on its input."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [RunSource.file_name]:
            (folder / RunSource.file_name).unlink()
            folder.rmdir()


def _same(one: Path, other: Path) -> bool:
    return one.expanduser().resolve() == other.expanduser().resolve()


def _source_of(folder: Path) -> str | None:
    """Return the path that a run was made for; ``None`` for any other folder."""
    try:
        return read_record(folder / RunSource.file_name, RunSource).source
    except CogflowError:
        return None


def _is_stage_record(folder: Path, stage: str) -> bool:
    try:
        return read_record(folder / f"{stage}.json", StageRecord).stage == stage
    except CogflowError:
        return False


def _is_latent_cache(folder: Path) -> bool:
    """Return whether ``folder`` holds the index of prepared clips, which may have gigabytes: its start is read."""
    path = folder / CacheIndex.file_name
    if not path.is_file():
        return False
    with open_regular(path) as file:
        head = file.read(HEAD_BYTES)
    return all(key in head for key in (b'"version"', b'"plan"', b'"fingerprint"'))
