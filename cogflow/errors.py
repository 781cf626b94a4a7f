"""Errors, by who can correct them. Each has one message, one hint and the exit code of the process."""

from __future__ import annotations


class CogflowError(Exception):
    """Base of all errors that cogflow raises on purpose.

    ``message``: what is wrong and where. ``hint``: what would be right. ``rank``: the only rank that raises it;
    ``None``: all ranks do.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.rank: int | None = None

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UserError(CogflowError):
    """The user's input cannot work."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class DataError(UserError):
    """Clips, captions or prompts cannot be used."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, altered, or belongs to another run."""


class ConversionError(UserError):
    """Weights cannot be converted into the requested component."""


class PipelineError(UserError):
    """Components do not fit together."""


class StorageError(UserError):
    """A path cannot be written, or holds too little free space."""


class RunInUse(UserError):
    """Another process writes into the run folder."""


class MemoryExhausted(UserError):
    """The settings need more memory than the machine has."""


class QualityGateError(CogflowError):
    """A result is worse than the limits allow. It is set aside and never published."""

    exit_code = 3


class RankLost(CogflowError):
    """Another process of the group has ended or hangs.

    The last checkpoint is whole, and the same command resumes from it.
    """


class Stopped(CogflowError):
    """A signal asked the run to stop. A checkpoint is saved, and the same command resumes from it."""

    exit_code = 75


def format_list(problems: list[str], most: int = 20) -> str:
    """Return the first ``most`` problems, one indented line each, and how many more there are, for an error message."""
    rest = len(problems) - most
    return "\n".join(f"  {problem}" for problem in problems[:most]) + (f"\n  and {rest} more" if rest > 0 else "")
