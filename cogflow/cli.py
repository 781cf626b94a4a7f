"""``python -m cogflow stage=NAME ...``: compose the settings, check them and run one stage.

The classes of :mod:`cogflow.errors` define the exit codes. 0: success, 1: unexpected error, 130: interrupted.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cogflow import __version__, rank_identity
from cogflow.artifacts.run_layout import RunLayout
from cogflow.artifacts.working_run import FAULTS, WorkingRun, choose_run, working_in
from cogflow.config.build import as_yaml
from cogflow.config.command import running
from cogflow.config.compose import ComposedCommand, compose_command
from cogflow.config.config import AnyConfig
from cogflow.config.help_text import USAGE, help_text, overview
from cogflow.config.problems import Problem, fail
from cogflow.errors import CogflowError, StorageError
from cogflow.files.atomic_write import append_text, write_first
from cogflow.files.contained_files import refuse_links_out
from cogflow.files.printable import paragraph, printable
from cogflow.files.secrets import scrub_text
from cogflow.files.usable_folder import explain_disk_errors, require_usable
from cogflow.stages import SUMMARIES, load

RUN_FOLDERS = (
    *("cache", "checkpoints", "weights", "samples", "watch", "sampled", "export", "parts", "pipeline"),
    *("data", "ladder", "diagnosis", "repaired", "replaced", "benchmark", "ranks", "lock", "wandb"),
)
"""Folders that the stages make inside a run."""
SHARED = (RunLayout(Path()).cache.name,)
"""Folders that a run may share with the run beside it: launch/slurm_array.sh links the prepared clips."""
LOGS = ("wandb",)
"""Folders of a run in which W&B links its log files, which are outside of the run."""
FLAGS = ("--help", "-h", "--cfg", "--version")


def run_process() -> None:
    """Run the command line of this process and exit.

    The exit code is also written to the file that ``COGFLOW_EXIT_FILE`` names, for launchers that replace it by their
    own. With several ranks, the first that fails writes it, because the others fail as a consequence.
    """
    code, note = main(sys.argv[1:]), os.environ.get("COGFLOW_EXIT_FILE")
    if note and (code or rank_identity.rank() == 0):
        write_first(Path(note), str(code))
    sys.exit(code)


def main(words: Sequence[str]) -> int:
    """Run one command and return its exit code. Errors are printed to standard error."""
    chosen: WorkingRun | None = None
    try:
        rank_identity.adopt_slurm_step()
        command = _compose_or_print(words)
        if command is not None:
            chosen = _choose_usable_run(command)
            _run_stage(words, command, chosen)
    except CogflowError as error:
        rank = rank_identity.rank()
        if rank == 0 or error.rank is not None:
            line = f"{f'rank {rank}: ' if error.rank else ''}{type(error).__name__}: {error}"
            print(paragraph(scrub_text(line)), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        heading = f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank_identity.rank()}"
        fault = printable(scrub_text(f"{heading}\n{traceback.format_exc()}"))
        print(fault, file=sys.stderr)
        if chosen is not None:
            append_text(chosen.folder / FAULTS, fault)
        return 1
    return 0


def _choose_usable_run(command: ComposedCommand) -> WorkingRun:
    """Return the run that the command works in.

    Raises :class:`StorageError` when that run's folder or ``stage.output`` cannot be written. Nothing is written.
    """
    for output in _outputs(command.config):
        require_usable(output, keys="stage.output")
        require_usable(output.absolute().parent, keys="stage.output")
    try:
        chosen = choose_run(command)
    except OSError as error:
        raise StorageError(f"A path of the command cannot be read: {error}", "Give the path of what exists.") from error
    stage = command.config.stage
    if not (getattr(stage, "plan", False) or getattr(stage, "dry_run", False)):  # they write nothing
        require_usable(chosen.folder, RUN_FOLDERS)
    refuse_links_out(chosen.folder, shared=SHARED, logs=LOGS)
    return chosen


def _outputs(config: AnyConfig) -> list[Path]:
    """Return the folder that ``stage.output`` names, if it names one."""
    output = getattr(config.stage, "output", None)
    return [] if output is None else [Path(output).expanduser()]


def _run_stage(words: Sequence[str], command: ComposedCommand, chosen: WorkingRun) -> None:
    """Run the stage in the run that was chosen for it, and print where that is."""
    config = command.config
    with working_in(chosen) as place, running(words, place.run), explain_disk_errors([place.folder, *_outputs(config)]):
        if place.line and rank_identity.rank() == 0:
            print(paragraph(place.line), flush=True)
        load(config.stage.name).run(replace(config, run=place.run))


def _compose_or_print(words: Sequence[str]) -> ComposedCommand | None:
    """Return the checked settings of a command that runs a stage; print the answer and return None for other commands.

    The other commands are those with ``--help``, ``--version`` or ``--cfg``, and the one without arguments.
    """
    flags = [word for word in words if word[:1] == "-"]
    choices = [word for word in words if word[:1] != "-"]
    fail([Problem(f"{flag}: no such option.") for flag in flags if flag not in FLAGS], USAGE)
    if "--version" in flags:
        print(__version__)
        return None
    if not words or "--help" in flags or "-h" in flags:
        print(help_text(choices, SUMMARIES))
        return None
    if rank_identity.rank() == 0 and not any(word.startswith(("stage=", "experiment=")) for word in choices):
        print(overview(SUMMARIES), end="\n\n", file=sys.stderr)
    command = compose_command(choices)
    if "--cfg" not in flags:
        return command
    print(as_yaml(replace(command.config, run=choose_run(command).run)), end="")
    return None
