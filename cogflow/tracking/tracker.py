"""Log what a stage measures and makes: to metrics.jsonl and events.jsonl always, to Weights & Biases beside them."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import SupportsFloat

from cogflow.config.config import AnyConfig
from cogflow.errors import CogflowError
from cogflow.files.hashing import hash_file
from cogflow.files.publish import MANIFEST
from cogflow.files.record_io import JsonValue, read_record, record_values, write_record
from cogflow.files.secrets import scrub, shorten_home
from cogflow.records.event_records import AlertEvent, ArtifactEvent, Cell, Event, MediaEvent, TableEvent
from cogflow.records.history_records import RunLine, read_history
from cogflow.records.run_records import RunToken
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.tracking.lineage import OUTSIDE, artifact_at, artifact_files, newest_artifacts, recorded_files
from cogflow.tracking.metrics_log import (
    EVENTS,
    METRICS,
    MetricsLog,
    append_line,
    drop_incomplete_line,
    read_events,
    to_number,
)
from cogflow.tracking.stage_record import command_line, package_versions, to_json, to_json_object
from cogflow.tracking.wandb_folders import NO_LINE, WANDB, echo_upload, run_id
from cogflow.tracking.wandb_mode import choose_mode
from cogflow.tracking.wandb_run import WandbRun, WandbSettings

MAX_NAME = 128
"""Characters of an artifact's name that W&B takes."""
ALERT_WORDS = {"INFO": "note", "WARN": "warning", "ERROR": "error"}

BEGIN_SECONDS = 5.0
"""Time in which W&B must start the run of a new line while training waits."""


def open_tracker(config: AnyConfig, stage: str, folder: Path) -> Tracker:
    """Return the tracker of ``stage`` for the run in ``folder``, to use as a context manager.

    Off rank 0 it does nothing.

    W&B: project and entity from the config, group = run.name, job type = stage, one run for each run folder, stage and
    line of the run's history (a second process continues the same id), files below ``folder/wandb``. It starts with the
    first value that is logged. ``WANDB_MODE`` overrides ``tracking.wandb``. Errors of W&B are never raised.
    """
    return MainTracker(config, stage, Path(folder)) if ranks.is_main() else Tracker()


class Tracker:
    """The interface that stages use. This base class does nothing: it is the tracker of ranks other than 0."""

    @property
    def url_or_dir(self) -> str:
        """W&B's page of this run when online, else the folder of its files; empty when W&B is off."""
        return ""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the W&B run, as failed when an exception ends the block."""

    def begin_line(self, line: RunLine) -> None:
        """Log to ``line`` of the run's history from now on, in a W&B run of its own.

        The W&B run of the former line ends meanwhile; nothing of it is lost. Nothing happens when ``line`` is the
        current one.
        """

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Log scalars at ``step`` under flat names such as ``train/loss``; Python, numpy or torch.

        NaN is null in ``metrics.jsonl``.
        """

    def rewind(self, step: int) -> None:
        """On resume from ``step``: remove training's lines beyond it, whose steps will run again."""

    def video(self, step: int, key: str, path: Path, caption: str = "") -> None:
        """Log an mp4 under ``key`` at ``step``."""

    def image(self, step: int, key: str, path: Path) -> None:
        """Log a png or jpg under ``key`` at ``step``."""

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Log a table; the report shows the newest of each key.

        Cells: text, numbers, None, paths of videos or pictures.
        """

    def artifact(self, name: str, type: str, files: Path | Iterable[Path], uses: Sequence[str] = ()) -> None:
        """Record a product of this stage, a folder or files, as a version of ``<run.name>-<name>``.

        ``uses``: names of artifacts that it was made from, of this run or as :meth:`input` returned them; a name that
        was never recorded is left out. W&B uploads the files when they have at most ``tracking.upload_mb`` together;
        otherwise it records their paths.
        """

    def input(self, path: Path, name: str, type: str = "model") -> str:
        """Return the name of the artifact at ``path``, for ``uses``.

        That is the one that a stage of this run made, where ``path`` is inside of it. Otherwise the folder or file is
        recorded as ``<run.name>-<name>``, by its path alone.
        """
        return name

    def alert(self, title: str, text: str, level: str = "WARN", picture: Path | None = None) -> None:
        """Warn the user on the console, in the report and on W&B. ``level``: INFO, WARN or ERROR.

        ``picture``: png or jpg that shows what is meant. W&B's alerts are text, so it is logged as an image
        ``alerts/frames``.
        """


class MainTracker(Tracker):
    """The tracker of rank 0."""

    def __init__(self, config: AnyConfig, stage: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.stage, self.folder = stage, folder
        self._config = config
        self._line = read_history(folder).current
        self._metrics = MetricsLog(folder / METRICS)
        drop_incomplete_line(folder / EVENTS)
        self._started: WandbRun | None = None
        self._former: list[WandbRun] = []
        self._inputs: set[tuple[str, str]] = set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for former in self._former:
            former.finish(0)
        if kind is not None or self._started is not None:  # W&B shows also a stage that failed before its first value
            self._run.finish(int(kind is not None))
        started = [*self._former, *([self._started] if self._started is not None else [])]
        if any(run.was_offline for run in started):
            echo_upload(self.folder)

    @property
    def _run(self) -> WandbRun:
        """The W&B run of this stage and line, which starts with its first use."""
        if self._started is None:
            self._started = WandbRun(self._wandb_settings())
        return self._started

    def _wandb_settings(self, start_seconds: float | None = None) -> WandbSettings:
        config, line, mode = self._config, self._line, choose_mode(self._config.tracking.wandb)
        token = "" if mode == "disabled" else _run_token(self.folder)
        settings = to_json_object(asdict(config))
        facts: dict[str, JsonValue] = {"command": command_line(), "versions": package_versions()}
        name = f"{config.run.name} {self.stage}"
        if line.number > 1 and self.stage not in NO_LINE:
            name += f" line {line.number}, from step {line.from_step}"
            former = run_id(token, self.stage, line.number - 1)
            facts["line"] = {
                "number": line.number,
                "from_step": line.from_step,
                "reason": line.reason,
                "replaces": former,
            }
        return WandbSettings(
            mode=mode,
            folder=self.folder,
            run_id=run_id(token, self.stage, line.number),
            name=name,
            project=config.tracking.project,
            entity=config.tracking.entity,
            group=config.run.name,
            job_type=self.stage,
            config=shorten_home(scrub(settings | facts)),
            start_seconds=start_seconds,
        )

    @property
    def url_or_dir(self) -> str:
        return self._run.url_or_dir

    def begin_line(self, line: RunLine) -> None:
        if line.number == self._line.number:
            return
        self._line = line
        former = self._started
        if former is None or former.run is None or self.stage in NO_LINE:
            return  # W&B has not started, or is disabled, or has failed
        former.end(0)
        self._former.append(former)
        self._started = WandbRun(self._wandb_settings(BEGIN_SECONDS))

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        self._metrics.log(step, values)
        scalars = {name: scalar for name, value in values.items() if (scalar := _scalar(value)) is not None}
        self._run.log(step, scalars)

    def rewind(self, step: int) -> None:
        self._metrics.rewind(step)
        _ = self._run  # W&B starts before the first step, so that no step waits for it

    def video(self, step: int, key: str, path: Path, caption: str = "") -> None:
        self._write_event(MediaEvent("video", step, key, self._relative(path), caption, self.stage, _now()))
        self._log_media(step, key, "video", path, caption)

    def image(self, step: int, key: str, path: Path) -> None:
        self._write_event(MediaEvent("image", step, key, self._relative(path), None, self.stage, _now()))
        self._log_media(step, key, "image", path)

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        cells = [[self._cell(value) for value in row] for row in rows]
        self._write_event(TableEvent(key, list(columns), cells, stage=self.stage, time=_now()))
        shown = [[value if isinstance(value, Path) else to_json(value) for value in row] for row in rows]
        if (media := self._run.table(columns, shown)) is not None:
            self._run.log(self._run.last_step, {key: media})

    def artifact(self, name: str, type: str, files: Path | Iterable[Path], uses: Sequence[str] = ()) -> None:
        members = artifact_files(files)
        known = newest_artifacts(read_events(self.folder / EVENTS))
        used = [known[full] for full in map(self._artifact_name, uses) if full in known]
        event = ArtifactEvent(
            name=self._artifact_name(name),
            type=type,
            files=len(members),
            bytes=_total_bytes(members),
            uses=[one.name for one in used],
            path=self._relative(files) if isinstance(files, Path) else None,
            paths=None if isinstance(files, Path) else [self._relative(path) for path in members.values()],
            manifest_sha256=hash_file(members[MANIFEST]) if MANIFEST in members else None,
            stage=self.stage,
            time=_now(),
        )
        self._write_event(event)
        for one in used:
            files_used = recorded_files(self.folder, one)
            self._run.artifact(one, files_used, upload=self._uploads(one, files_used), used=True)
        self._run.artifact(event, members, upload=self._uploads(event, members))

    def input(self, path: Path, name: str, type: str = "model") -> str:
        own = artifact_at(self.folder, newest_artifacts(read_events(self.folder / EVENTS)), path)
        if own is not None:
            return own.name
        full, where = self._artifact_name(name), self._relative(path)
        if (full, where) not in self._inputs:
            self._inputs.add((full, where))
            members = artifact_files(path)
            size = _total_bytes(members)
            self._write_event(ArtifactEvent(full, type, len(members), size, [], path=where, stage=OUTSIDE, time=_now()))
        return full

    def alert(self, title: str, text: str, level: str = "WARN", picture: Path | None = None) -> None:
        echo(f"{ALERT_WORDS.get(level, 'error')}: {title}: {text}")
        shown = None if picture is None else self._relative(picture)
        self._write_event(AlertEvent(title, text, level, shown, stage=self.stage, time=_now()))
        if picture is not None:
            self._log_media(self._run.last_step, "alerts/frames", "image", picture, f"{title}: {text}")
        self._run.alert(title, text, level)

    def _uploads(self, event: ArtifactEvent, files: Mapping[str, Path]) -> bool:
        """Return whether W&B gets the files, not their paths alone."""
        return event.stage != OUTSIDE and _total_bytes(files) <= self._config.tracking.upload_mb * 1e6

    def _write_event(self, event: Event) -> None:
        append_line(self.folder / EVENTS, scrub(record_values(event)))

    def _log_media(self, step: int, key: str, kind: str, path: Path, caption: str = "") -> None:
        if self._config.tracking.videos and (media := self._run.media(kind, path, caption)) is not None:
            self._run.log(step, {key: media})

    def _cell(self, value: object) -> Cell:
        if isinstance(value, Path):
            return self._relative(value)
        cell = to_json(value)
        if isinstance(cell, float):
            return to_number(cell)
        return cell if cell is None or isinstance(cell, str | int) else str(cell)

    def _relative(self, path: Path) -> str:
        path, folder = Path(path).resolve(), self.folder.resolve()
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)

    def _artifact_name(self, name: str) -> str:
        prefix = f"{self._config.run.name}-"
        full = name if name.startswith(prefix) else prefix + name
        return re.sub(r"[^\w.\-]", "-", full, flags=re.ASCII)[:MAX_NAME]


def _now() -> float:
    return round(time.time(), 3)


def _run_token(folder: Path) -> str:
    """Return a random name of this run folder. Another folder of the same name is another run to W&B."""
    path = folder / WANDB / RunToken.file_name
    try:
        return read_record(path, RunToken).id
    except CogflowError:
        token = secrets.token_hex(4)
        write_record(path, RunToken(token))
        return token


def _total_bytes(files: Mapping[str, Path]) -> int:
    return sum(path.stat().st_size for path in files.values())


def _scalar(value: SupportsFloat) -> float | None:
    number = to_number(value)
    if number is not None:
        return number
    try:
        return float(value)  # NaN and infinity: W&B shows them, JSON cannot
    except (TypeError, ValueError):
        return None
