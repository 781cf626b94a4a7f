"""Build the commands that messages, records and reports show, so that they run as printed.

A value is quoted twice: for the grammar of Hydra's overrides and for the shell. A command names its run where another
command would not work in it by default.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cogflow.config.run_section import RunConfig

PROGRAM = ("python", "-m", "cogflow")
"""Words that start every command."""

RUN_FROM_PATH = {
    "export": ("stage.source",),
    "sample": ("stage.source",),
    "diagnose": ("stage.candidate",),
    "assemble": ("stage.transformer", "stage.output"),
}
"""Stage -> settings whose path chooses the run to work in when the command names none, the first that is in a run."""

SettingValue: TypeAlias = str | Path | bool | int | float | Sequence[str]

_UNQUOTED = re.compile(r"\.\.?|(?:[A-Za-z_/]|\.\.?/)[A-Za-z0-9_/.-]*", re.ASCII)
_SPECIAL = ("true", "false", "null", "nan", "inf", "infinity")


@dataclass(frozen=True)
class Invocation:
    """The running command: the words of its command line and the run that it works in."""

    words: tuple[str, ...] = ()
    run: RunConfig = RunConfig()


_invocation: ContextVar[Invocation | None] = ContextVar("invocation", default=None)


@contextmanager
def running(words: Sequence[str], run: RunConfig) -> Iterator[None]:
    """Make ``words`` and ``run`` those of the running command, from which other commands are built."""
    token = _invocation.set(Invocation(tuple(words), run))
    try:
        yield
    finally:
        _invocation.reset(token)


def _running_command() -> Invocation:
    return _invocation.get() or Invocation()


def command(stage: str, settings: Mapping[str, SettingValue | None], run: RunConfig | None = None) -> str:
    """Return the command that runs ``stage`` with ``settings`` (dotted keys), quoted for a POSIX shell.

    Settings that are None are left out. ``run``: the run to work in, by default that of the running command. It is
    named where it differs from the defaults, and where a path among ``settings`` could choose another run.
    """
    run = run or _running_command().run
    given = {key: value for key, value in settings.items() if value is not None}
    words = [f"stage={stage}", *(override(key, value) for key, value in given.items())]
    words += _run_words(run, named=bool(given.keys() & set(RUN_FROM_PATH.get(stage, ()))))
    return command_of(words)


def command_of(words: Sequence[str]) -> str:
    """Return the command with ``words``, as they are on a command line, quoted for a POSIX shell."""
    return shlex.join([*PROGRAM, *words])


def command_again(recorded: str, run: RunConfig, without: Collection[str] = ()) -> str:
    """Return the ``recorded`` command of a stage, to run again in ``run`` and without the settings ``without``.

    Return an empty string for a command of another program.
    """
    try:
        words = shlex.split(recorded)
    except ValueError:
        return ""
    if tuple(words[: len(PROGRAM)]) != PROGRAM:
        return ""
    removed = {"run.root", "run.name", *without}
    kept = [word for word in words[len(PROGRAM) :] if _key(word) not in removed]
    return command_of([*kept, *_run_words(run, named=True)])


def repeated(settings: Mapping[str, SettingValue]) -> str:
    """Return the running command with other ``settings`` of training, such as ``stage.on_blur``, to resume the run.

    A ``stage.resume`` of the running command is left out: it would begin again. ``stage.`` becomes ``stage.train.``
    for stage=flow. Without a command line, return a ``stage=train`` of the run.
    """
    now = _running_command()
    if not now.words:
        return command("train", settings)
    if "stage=flow" in now.words:
        settings = {re.sub(r"^stage\.", "stage.train.", key): value for key, value in settings.items()}
    removed = {*settings, "stage.resume", "stage.train.resume"}
    kept = [word for word in now.words if _key(word) not in removed]
    return shlex.join([*_launcher(), *kept, *(override(key, value) for key, value in settings.items())])


def same_settings(stage: str) -> str:
    """Return the command that runs ``stage`` in the run of the running command, with its settings of other sections."""
    now = _running_command()
    kept = [word for word in now.words if not re.match(r"\+?(stage[.=]|run\.)", word)]
    return command_of([f"stage={stage}", *kept, *_run_words(now.run, named=False)])


def typed_command(argv: Sequence[str]) -> str:
    """Return ``argv``, the arguments of this process, as a user would type them."""
    if argv and Path(argv[0]).parts[-2:] == ("cogflow", "__main__.py"):
        return command_of(argv[1:])
    return shlex.join(argv)


def options(settings: Mapping[str, SettingValue]) -> str:
    """Return ``settings`` (dotted keys) as words to add to a command, quoted for a POSIX shell."""
    return shlex.join(override(key, value) for key, value in settings.items())


def override(key: str, value: SettingValue) -> str:
    """Return ``key=value`` as one word of the command line, quoted for Hydra and not yet for the shell."""
    return f"{key}={_hydra(value)}"


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _run_words(run: RunConfig, *, named: bool) -> list[str]:
    """Return the words that name ``run``; its name also where it is the default one if ``named``."""
    default = RunConfig()
    words = [override("run.root", run.root)] if run.root != default.root else []
    return words + ([override("run.name", run.name)] if named or run.name != default.name else [])


def _hydra(value: SettingValue) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str | Path):
        return _hydra_text(str(value))
    return f"[{','.join(_hydra(one) for one in value)}]"


def _hydra_text(text: str) -> str:
    if _UNQUOTED.fullmatch(text) and text.lower() not in _SPECIAL:
        return text
    if not re.search(r"[\"\\]|\$\{", text):
        return f'"{text}"'  # the shell's own quotes can stay around it, which is easier to read
    # OmegaConf: a backslash before ${ keeps it from being an interpolation; backslashes before that one are doubled.
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    # Hydra: a quote inside quotes is written \', and backslashes before any quote are doubled.
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    text = re.sub(r"(\\+)\Z", r"\1\1", text)
    return f"'{text}'"


def _launcher() -> Sequence[str]:
    """Return the words that started this process; of a launcher other than torchrun on one machine, ``PROGRAM``."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks != "1" and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_WORLD_SIZE") == ranks:
        return ("torchrun", "--nproc-per-node", ranks, *PROGRAM[1:])
    return PROGRAM
