"""Settings of the run folder and of experiment tracking: ``run.*`` and ``tracking.*``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogflow.config.setting import NOT_EMPTY, at_least, matching, one_of, setting

_CONTROLS = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
FOLDER_NAME = matching(
    rf"[^./\s{_CONTROLS}][^/{_CONTROLS}]*",
    "a folder name",
    "a plain folder name without slashes, control characters or a leading dot",
)


@dataclass(frozen=True)
class RunConfig:
    """``run.*``"""

    root: str = setting("runs", help="Folder that contains all runs.", rule=NOT_EMPTY)
    name: str = setting(
        "tiny-shapes",
        help="Folder of this run inside run.root. The same command with the same name resumes the run. Without a name, "
        "export, sample, diagnose and assemble work in the run that their path is in, else in a run named after it.",
        rule=FOLDER_NAME,
    )


def run_at(folder: Path) -> RunConfig:
    """Return the settings that name the run in ``folder``."""
    named = folder if folder.name else folder.absolute()
    return RunConfig(root=str(named.parent), name=named.name)


@dataclass(frozen=True)
class TrackingConfig:
    """``tracking.*``"""

    project: str = setting("cogflow", help="Weights & Biases project.", rule=NOT_EMPTY)
    wandb: str = setting(
        "offline",
        help="Mode of Weights & Biases. The environment variable WANDB_MODE takes precedence.",
        rule=one_of("offline", "online", "disabled"),
    )
    entity: str | None = setting(None, help="Weights & Biases team or user. Default: the one of the account.")
    log_every: int = setting(1, help="Steps between two lines of metrics.jsonl.", rule=at_least(1))
    videos: bool = setting(True, help="Log sample videos besides scalars.")
    upload_mb: float = setting(
        512.0,
        help="Largest artifact that is uploaded, in MB. Of a larger one W&B gets the paths only.",
        rule=at_least(0),
    )
