"""What can go wrong, by who can mend it. Each error carries one message, one hint and the process's exit code."""

from __future__ import annotations


class CogflowError(Exception):
    """Base of everything cogflow raises on purpose.

    ``message`` says what is wrong and where; ``hint`` says what would be right.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.rank: int | None = None  # of the only one that knows of it; None: all raise the same

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UserError(CogflowError):
    """The user's input cannot work."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, of the wrong kind, out of range, or contradicts another."""


class DataError(UserError):
    """Clips, captions or prompts cannot be used."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, altered, or belongs to another run."""


class ConversionError(UserError):
    """Weights cannot be turned into the component that was asked for."""


class PipelineError(UserError):
    """Components do not fit together."""


class StorageError(UserError):
    """A path cannot be written, or holds too little free space."""


class MemoryExhausted(UserError):
    """The settings need more memory than there is."""


class QualityGateError(CogflowError):
    """A result is worse than it may be. It is kept apart and never published."""

    exit_code = 3


class RankLost(CogflowError):
    """Another process of the group is gone, or stands still; what it had saved is whole, and the same command goes on from there."""


class Stopped(CogflowError):
    """A signal asked for the end; a checkpoint is saved and the same command goes on."""

    exit_code = 75


def format_list(problems: list[str], most: int = 20) -> str:
    """Return the first ``most`` problems, one indented line each, and how many more there are, for an error message."""
    rest = len(problems) - most
    return "\n".join(f"  {problem}" for problem in problems[:most]) + (f"\n  and {rest} more" if rest > 0 else "")
