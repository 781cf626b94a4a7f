"""Where a stage puts what it measures and makes: metrics.jsonl and events.jsonl always, Weights & Biases beside them."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cogflow.config.schema import AnyConfig
from cogflow.files.atomic_write import write_json
from cogflow.files.hashing import hash_file
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.tracking.metrics_log import EVENTS, MetricsLog, append_line, number
from cogflow.tracking.secrets import scrub
from cogflow.tracking.stage_record import command_line, plain, versions
from cogflow.tracking.wandb_mode import choose_mode
from cogflow.tracking.wandb_run import WandbRun


def open_tracker(config: AnyConfig, stage: str, folder: Path) -> Tracker:
    """The tracker of ``stage`` for the run in ``folder``; use it as a context manager. Off rank 0 it does nothing.

    W&B: project and entity from the config, group = run.name, job type = stage, one run per run folder and stage (a
    second process goes on with the same id), files below ``folder/wandb``. ``WANDB_MODE`` wins over ``tracking.wandb``.
    No trouble with W&B is ever raised.
    """
    return MainTracker(config, stage, Path(folder)) if ranks.is_main() else Tracker()


class Tracker:
    """What every stage talks to. This one takes everything and does nothing: the tracker of ranks other than 0."""

    @property
    def url_or_dir(self) -> str:
        return ""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def video(self, step: int, key: str, path: Path, caption: str = "") -> None:
        pass

    def image(self, step: int, key: str, path: Path) -> None:
        pass

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        pass

    def artifact(self, name: str, type: str, files: Path | Iterable[Path], uses: Sequence[str] = ()) -> None:
        pass

    def alert(self, title: str, text: str, level: str = "WARN", picture: Path | None = None) -> None:
        pass


class MainTracker(Tracker):
    """The tracker of rank 0."""

    def __init__(self, config: AnyConfig, stage: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.stage, self.folder = stage, folder
        self._config = config
        self._metrics = MetricsLog(folder / "metrics.jsonl")
        MetricsLog(folder / EVENTS)  # mends a torn end
        self._run = WandbRun(
            mode=choose_mode(config.tracking.wandb),
            folder=folder,
            run_id=f"{_run_token(folder)}-{stage}",
            project=config.tracking.project,
            entity=config.tracking.entity,
            group=config.run.name,
            job_type=stage,
            config=scrub(plain(config) | {"command": command_line(), "versions": versions()}),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(int(kind is not None))

    @property
    def url_or_dir(self) -> str:
        """W&B's page of this run when online, else the folder of its files; empty when W&B is off."""
        return self._run.place

    def close(self, exit_code: int = 0) -> None:
        """End the W&B run; 0 marks it as finished, anything else as failed."""
        self._run.finish(exit_code)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Scalars at ``step`` under flat names such as ``train/loss``; Python, numpy or torch; NaN is null in metrics.jsonl."""
        self._metrics.log(step, values)
        self._run.log(step, {name: scalar for name, value in values.items() if (scalar := _scalar(value)) is not None})

    def rewind(self, step: int) -> None:
        """On resume from ``step``: forget the training lines beyond it, which are about to come again."""
        self._metrics.rewind(step)

    def video(self, step: int, key: str, path: Path, caption: str = "") -> None:
        """An mp4 under ``key`` at ``step``."""
        self._event("video", step=step, key=key, path=self._relative(path), caption=caption)
        if self._config.tracking.videos and (media := self._run.media("video", path, caption)) is not None:
            self._run.log(step, {key: media})

    def image(self, step: int, key: str, path: Path) -> None:
        """A png or jpg under ``key`` at ``step``."""
        self._event("image", step=step, key=key, path=self._relative(path))
        if self._config.tracking.videos and (media := self._run.media("image", path)) is not None:
            self._run.log(step, {key: media})

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; the newest under a key is the one the report shows. Cells: text, numbers, ``None``, paths of videos or pictures."""
        cells = [[self._relative(cell) if isinstance(cell, Path) else plain(cell) for cell in row] for row in rows]
        self._event("table", key=key, columns=list(columns), rows=cells)
        shown = [[cell if isinstance(cell, Path) else plain(cell) for cell in row] for row in rows]
        if (media := self._run.table(columns, shown)) is not None:
            self._run.log(self._run.last_step, {key: media})

    def artifact(self, name: str, type: str, files: Path | Iterable[Path], uses: Sequence[str] = ()) -> None:
        """Record a product of this stage: a folder, a file, or several files, as a version of ``<run.name>-<name>``.

        ``uses`` names the artifacts of this run that it was made from. Up to ``tracking.upload_mb`` the files belong to the
        W&B artifact, beyond that it only points to them.
        """
        members = _members(files)
        total = sum(path.stat().st_size for path in members.values())
        upload = total <= self._config.tracking.upload_mb * 1e6
        inputs = [self._artifact_name(used) for used in uses]
        facts: dict[str, Any] = {"files": len(members), "bytes": total, "uses": inputs, "stage": self.stage}
        if isinstance(files, Path):
            facts["path"] = self._relative(files)
        if "manifest.json" in members:
            facts["manifest_sha256"] = hash_file(members["manifest.json"])
        self._event("artifact", name=self._artifact_name(name), type=type, **facts)
        self._run.artifact(self._artifact_name(name), type, members, facts, upload=upload, uses=inputs)

    def alert(self, title: str, text: str, level: str = "WARN", picture: Path | None = None) -> None:
        """Tell whoever watches: a line on the console, the report, W&B. ``level``: INFO, WARN or ERROR.

        ``picture`` (png or jpg) shows what is meant; W&B's alerts are text, so it gets it as an image ``alerts/frames`` beside.
        """
        echo(f"{'note' if level == 'INFO' else 'warning' if level == 'WARN' else 'error'}: {title}: {text}")
        shown = {} if picture is None else {"picture": self._relative(picture)}
        self._event("alert", title=title, text=text, level=level, **shown)
        if (
            picture is not None
            and self._config.tracking.videos
            and (media := self._run.media("image", picture, f"{title}: {text}")) is not None
        ):
            self._run.log(self._run.last_step, {"alerts/frames": media})
        self._run.alert(title, text, level)

    def _event(self, kind: str, **facts: Any) -> None:
        line = {"kind": kind, "stage": self.stage, "time": round(time.time(), 3)} | facts
        append_line(self.folder / EVENTS, scrub(_finite(line)))

    def _relative(self, path: Path) -> str:
        path, folder = Path(path).resolve(), self.folder.resolve()
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)

    def _artifact_name(self, name: str) -> str:
        prefix = f"{self._config.run.name}-"
        whole = name if name.startswith(prefix) else prefix + name
        return re.sub(r"[^\w.\-]", "-", whole, flags=re.ASCII)[:128]


def _run_token(folder: Path) -> str:
    """A random name that belongs to this run folder: another folder of the same name is another run to W&B."""
    path = folder / "wandb" / "id.json"
    try:
        return str(json.loads(path.read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        token = secrets.token_hex(4)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"id": token})
        return token


def _members(files: Path | Iterable[Path]) -> dict[str, Path]:
    """Name inside the artifact -> file. Hidden files are partial writes and stay out."""
    if not isinstance(files, Path):
        return {path.name: path for path in map(Path, files)}
    if files.is_file():
        return {files.name: files}
    inside = {path.relative_to(files).as_posix(): path for path in sorted(files.rglob("*")) if path.is_file()}
    return {name: path for name, path in inside.items() if not any(part.startswith(".") for part in name.split("/"))}


def _scalar(value: Any) -> Any:
    exact = number(value)
    if exact is not None:
        return exact
    try:
        return float(value)  # NaN and infinities: W&B shows them, JSON cannot
    except (TypeError, ValueError):
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
