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

from cogflow import __version__
from cogflow.artifacts.working_run import FAULTS, WorkingRun, choose_run, working_in
from cogflow.config.build import as_yaml
from cogflow.config.command import running
from cogflow.config.compose import ComposedCommand, compose_command
from cogflow.config.help_text import USAGE, help_text, overview
from cogflow.config.problems import Problem, fail
from cogflow.errors import CogflowError
from cogflow.files.atomic_write import append_text, write_first
from cogflow.files.printable import paragraph, printable
from cogflow.stages import SUMMARIES, load

FLAGS = ("--help", "-h", "--cfg", "--version")


def run_process() -> None:
    """Run the command line of this process and exit.

    The exit code is also written to the file that ``COGFLOW_EXIT_FILE`` names, for launchers that replace it by their
    own. With several ranks, the first that fails writes it, because the others fail as a consequence.
    """
    code, note = main(sys.argv[1:]), os.environ.get("COGFLOW_EXIT_FILE")
    if note and (code or os.environ.get("RANK", "0") == "0"):
        write_first(Path(note), str(code))
    sys.exit(code)


def main(words: Sequence[str]) -> int:
    """Run one command and return its exit code. Errors are printed to standard error."""
    rank = os.environ.get("RANK", "0")
    chosen: WorkingRun | None = None
    try:
        command = _compose_or_print(words, rank)
        if command is not None:
            chosen = choose_run(command)
            _run_stage(words, command, chosen, rank)
    except CogflowError as error:
        if rank == "0" or error.rank is not None:
            line = f"{f'rank {rank}: ' if error.rank else ''}{type(error).__name__}: {error}"
            print(paragraph(line), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        fault = printable(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank}\n{traceback.format_exc()}")
        print(fault, file=sys.stderr)
        if chosen is not None:
            append_text(chosen.folder / FAULTS, fault)
        return 1
    return 0


def _run_stage(words: Sequence[str], command: ComposedCommand, chosen: WorkingRun, rank: str) -> None:
    """Run the stage in the run that was chosen for it, and print where that is."""
    config = command.config
    with working_in(chosen) as place, running(words, place.run):
        if place.line and rank == "0":
            print(paragraph(place.line), flush=True)
        load(config.stage.name).run(replace(config, run=place.run))


def _compose_or_print(words: Sequence[str], rank: str) -> ComposedCommand | None:
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
    if rank == "0" and not any(word.startswith(("stage=", "experiment=")) for word in choices):
        print(overview(SUMMARIES), end="\n\n", file=sys.stderr)
    command = compose_command(choices)
    if "--cfg" not in flags:
        return command
    print(as_yaml(replace(command.config, run=choose_run(command).run)), end="")
    return None
