"""Call Weights & Biases. Every error becomes one warning, and the work continues without W&B."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from cogflow.files.publish import MANIFEST
from cogflow.files.record_io import JsonObject
from cogflow.records.event_records import ArtifactEvent
from cogflow.runtime.console import echo
from cogflow.tracking.wandb_mode import server_address
from cogflow.tracking.wandb_service import NoAnswerError, WandbCaller, call_within, end_service

INIT_SECONDS = 30.0
"""Time in which W&B must accept an online run; after that the run continues offline."""

FINISH_SECONDS = 300.0
"""Time for the last uploads. What is not sent by then stays on disk for ``wandb sync``."""

USE_SECONDS = 30.0
"""Time in which W&B's server must take an input artifact."""

CALL_SECONDS = 30.0
"""Time in which W&B's service must take a row, a picture or an alert. It takes them whatever the network does."""

ARTIFACT_SECONDS = 120.0
"""Time in which W&B's service must take an artifact, for which it asks its server."""

MAX_FAILURES = 3
"""After this many failed calls W&B is not called any more."""

SETTINGS: dict[str, str | bool | float] = {
    "silent": True,
    "console": "off",
    # Code, git remotes, the raw command and the names of the machine and its user are not sent: cogflow's own records
    # hold what is needed, without secrets. x_disable_machine_info would also stop the metrics of CPU, memory and GPU.
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "host": "",
    # Seconds of rows that a kill takes from the offline file; by default 15.
    "x_transaction_log_flush_interval": 1.0,
    "init_timeout": INIT_SECONDS,
    "login_timeout": 5.0,
    "finish_timeout": FINISH_SECONDS,
}
"""Settings of W&B. Those that the installed version does not know are left out."""

FOREIGN_IDS = (
    "WANDB_RUN_ID",
    "WANDB_RESUME",
    "WANDB_RESUME_FROM",
    "WANDB_FORK_FROM",
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
)
"""Environment variables that are ignored: they name one run, and cogflow has one for each stage and line."""

MEDIA_KINDS = {".mp4": "video", ".webm": "video", ".png": "image", ".jpg": "image"}

T = TypeVar("T")


@dataclass(frozen=True)
class WandbSettings:
    """One W&B run. ``mode``: online, offline or disabled. ``folder``: where its files go, below ``wandb/``.

    ``start_seconds``: time in which W&B must start the run; None for its first start in the process, which also starts
    W&B's service.
    """

    mode: str
    folder: Path
    run_id: str
    name: str
    project: str
    entity: str | None
    group: str
    job_type: str
    config: JsonObject
    start_seconds: float | None = None


class WandbRun:
    """One W&B run, which may be absent: ``run`` is None when W&B is disabled or has failed."""

    active = 0
    """Runs of this process that have started and not ended."""

    def __init__(self, settings: WandbSettings) -> None:
        self.run: Any = None
        self.online = False
        self._rows = RowCount()
        self._failures = 0
        self._axes: set[str] = set()
        self.was_offline = False
        self._end: Future[Any] | None = None
        self._ended = 0.0
        if settings.mode == "disabled":
            return
        self._caller = WandbCaller()
        if settings.mode == "online":
            start = partial(_start_in_time, settings, online=True, run_id=settings.run_id)
            self.run = self._try("could not be reached; going on offline", start)
            self.online = self.run is not None
        if self.run is None:
            run_id = self._offline_id(settings.run_id) if settings.mode == "online" else settings.run_id
            start = partial(_start_in_time, settings, online=False, run_id=run_id)
            self.run = self._try("could not start; going on without it", start)
        if self.run is not None:
            WandbRun.active += 1
            self.was_offline = not self.online
            self._rows = RowCount(self._try("did not give its step", lambda: int(self.run.step)) or 0)
            self.define_axes("train", "heldout", "sharpness", "samples")

    @property
    def url_or_dir(self) -> str:
        """The run's page when online, else the folder of its files; empty without a run."""
        if self.run is None:
            return ""
        run = self.run
        found = self._try("did not give its place", lambda: str((self.online and run.url) or run.settings.sync_dir))
        return found or ""

    def define_axes(self, *prefixes: str) -> None:
        """Draw values named ``prefix/...`` over cogflow's ``step``, not over W&B's own count of calls."""
        fresh = [prefix for prefix in prefixes if prefix not in self._axes]
        if not fresh:
            return

        def define() -> None:
            if not self._axes:
                self.run.define_metric("step", hidden=True)
            for prefix in fresh:
                self._axes.add(prefix)
                self.run.define_metric(f"{prefix}/*", step_metric="step")

        self.call("did not take the step axis", define)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log ``values`` (scalars or W&B media) at ``step``. The call is queued: training does not wait for it."""
        if self.run is None:
            return
        self.define_axes(*{name.partition("/")[0] for name in values if "/" in name})
        count = self._rows.at(step)
        self._report_queued_failures()
        if (run := self.run) is not None:
            self._caller.queue("did not take a row", lambda: run.log({"step": step} | dict(values), step=count))

    def media(self, kind: str, path: Path, caption: str = "") -> Any:
        """Return ``path`` as W&B's Video or Image; None on failure. ``kind``: video or image."""

        def wrap() -> Any:
            import wandb

            if kind == "video":
                return wandb.Video(str(path), caption=caption or None, format=path.suffix.lstrip(".") or "mp4")
            return wandb.Image(str(path), caption=caption or None)

        return self.call(f"did not take {path.name}", wrap)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Any:
        """Return a W&B table; None on failure. Cells that are paths of videos or pictures become playable."""

        def cell(value: object) -> Any:
            if not isinstance(value, Path):
                return value
            kind = MEDIA_KINDS.get(value.suffix.lower())
            return self.media(kind, value) if kind and value.is_file() else str(value)

        def build() -> Any:
            import wandb

            data = [[cell(value) for value in row] for row in rows]
            return wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)

        return self.call("did not take a table", build)

    def artifact(self, event: ArtifactEvent, files: Mapping[str, Path], *, upload: bool, used: bool = False) -> None:
        """Record ``files`` (path by name inside the artifact) as a version of ``event.name``.

        Without ``upload`` W&B gets their paths and the manifest, whose hash tells versions at one path apart. ``used``:
        the artifact is an input of this run. The version that another run of the project logged has the same content,
        so W&B joins both; this works also where that run is not uploaded yet.
        """

        def build() -> None:
            import wandb

            artifact = wandb.Artifact(event.name, event.type, metadata=_artifact_metadata(event))
            for inside, path in files.items():
                if upload or inside == MANIFEST:
                    artifact.add_file(str(path), name=inside, policy="immutable", skip_cache=True)
                else:
                    artifact.add_reference(path.resolve().as_uri(), name=inside, checksum=False)
            if not used:
                self.run.log_artifact(artifact)
            elif self.online:
                call_within(USE_SECONDS, partial(self.run.use_artifact, artifact))
            else:  # the public method refuses to work offline; the record that it writes is the same
                self.run._log_artifact(artifact, is_user_created=True, use_after_commit=True)

        self.call(f"did not take the artifact {event.name}", build, ARTIFACT_SECONDS)

    def alert(self, title: str, text: str, level: str) -> None:
        """Send an alert. ``level``: INFO, WARN or ERROR."""
        self.call("did not take an alert", lambda: self.run.alert(title=title, text=text, level=level))

    @property
    def last_step(self) -> int:
        """The step of the newest row."""
        return self._rows.step

    def end(self, exit_code: int) -> None:
        """Begin to end the run, without waiting; 0 marks it as finished, anything else as failed."""
        if (run := self.run) is not None and self._end is None:
            self._end, self._ended = self._caller.submit(lambda: run.finish(exit_code=exit_code)), time.monotonic()

    def finish(self, exit_code: int) -> None:
        """End the run and wait until everything is written or sent, at most ``FINISH_SECONDS`` after :meth:`end`."""
        self.end(exit_code)
        if self.run is None or self._end is None:
            return
        run, end, seconds = self.run, self._end, time.monotonic() - self._ended
        folder = self._try("did not give its place", lambda: str(run.settings.sync_dir)) or ""
        # The actions of a run follow one another, so this one waits for the end.
        limit = FINISH_SECONDS if self.online else CALL_SECONDS
        self.call("did not finish", end.result, max(CALL_SECONDS, limit + CALL_SECONDS - seconds))
        self._drop_run()
        seconds = time.monotonic() - self._ended
        if self.online and seconds >= float(SETTINGS["finish_timeout"]):
            command = shlex.join(["wandb", "sync", "--include-online", folder])
            echo(f"warning: W&B did not take everything in {seconds:.0f} s; to upload the rest: {command}")

    def call(self, failure: str, action: Callable[[], T], seconds: float | None = None) -> T | None:
        """Return ``action()``, or None after a warning.

        After too many failures, or when a call takes longer than ``seconds`` (default ``CALL_SECONDS``), nothing is
        called any more.
        """
        self._report_queued_failures()
        if self.run is None:
            return None
        hung = False

        def bounded() -> T:
            nonlocal hung
            try:
                return self._caller.call(action, CALL_SECONDS if seconds is None else seconds)
            except NoAnswerError:
                hung = True
                raise

        result = self._try(failure, bounded)
        self._give_up_if_failing(hung)
        return result

    def _offline_id(self, run_id: str) -> str:
        """Return an id to continue with offline: W&B's service keeps the id that could not go online until it ends."""
        if WandbRun.active:  # ending the service would end other stages' runs, too
            return f"{run_id}-offline"
        end_service(at_once=True)
        return run_id

    def _report_queued_failures(self) -> None:
        """Warn of the queued rows that failed."""
        if self.run is None:
            return
        errors = self._caller.failures(CALL_SECONDS)
        for failure, error in errors:
            self._warn(failure, error)
        self._give_up_if_failing(any(isinstance(error, NoAnswerError) for _, error in errors))

    def _give_up_if_failing(self, hung: bool) -> None:
        """Stop calling W&B when it hangs or has failed too often."""
        if not hung and self._failures < MAX_FAILURES:
            return
        why = "does not answer" if hung else "failed too often"
        echo(f"warning: W&B {why} and is left alone; metrics.jsonl and report.html hold everything")
        self._drop_run()
        if not WandbRun.active:  # ending the service would end other stages' runs, too
            end_service(at_once=hung)

    def _drop_run(self) -> None:
        WandbRun.active -= self.run is not None
        self._caller.close()
        self.run = None

    def _try(self, failure: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Exception as error:  # noqa: BLE001 - an optional service must never end the work, whatever it raises
            self._warn(failure, error)
            return None

    def _warn(self, failure: str, error: Exception) -> None:
        self._failures += 1
        first = (str(error).strip().splitlines() or [""])[0][:200]
        echo(f"warning: W&B {failure} ({type(error).__name__}: {first})")


@cache
def _warn_of_foreign_ids(names: tuple[str, ...]) -> None:
    echo(f"warning: cogflow ignores {', '.join(names)}: it has a W&B run for each stage and line of a run folder")


class RowCount:
    """Count W&B's rows. W&B drops rows whose count goes back, and steps do after a resume from an earlier checkpoint.

    The count then continues, and a row's ``step`` holds the real step. Rows of one step have one count.
    """

    def __init__(self, least: int = 0) -> None:
        self.step = 0
        self._least = least
        self._offset = 0

    def at(self, step: int) -> int:
        """Return the count of a row at ``step``."""
        least = self._least if step >= self.step else self._least + 1
        self._offset = max(self._offset, least - step)
        self.step, self._least = step, step + self._offset
        return self._least


def _start_in_time(settings: WandbSettings, *, online: bool, run_id: str) -> Any:
    """Return the started run of W&B. Raises :class:`NoAnswerError` after ``settings.start_seconds``."""
    start = partial(_start, settings, online=online, run_id=run_id)
    return start() if settings.start_seconds is None else call_within(settings.start_seconds, start)


def _start(settings: WandbSettings, *, online: bool, run_id: str) -> Any:
    """Return the started run of W&B."""
    import wandb

    # W&B keeps the address from its first use in the process, and takes another one from ./wandb/settings.
    address = {"base_url": server_address()}
    if online:
        echo(f"W&B: sending to {address['base_url']}")
    limit = {} if settings.start_seconds is None else {"init_timeout": settings.start_seconds}
    given = SETTINGS | address | limit
    known = {name: value for name, value in given.items() if name in wandb.Settings.model_fields}
    with _without_foreign_ids():
        return wandb.init(
            mode="online" if online else "offline",
            dir=str(settings.folder),
            id=run_id,
            resume="allow",
            reinit="create_new",  # flow's stages share a process: each needs its own run
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            job_type=settings.job_type,
            name=settings.name,
            config=dict(settings.config),
            settings=wandb.Settings(**known),
        )


@contextmanager
def _without_foreign_ids() -> Iterator[None]:
    """Hide the environment variables that name one run, which would join stages and lines, or keep W&B from starting.

    W&B takes the ids of a sweep's runs from the sweep, and refuses a fork together with an id.
    """
    hidden = {name: os.environ.pop(name) for name in FOREIGN_IDS if name in os.environ}
    if hidden:
        _warn_of_foreign_ids(tuple(hidden))
    try:
        yield
    finally:
        os.environ.update(hidden)


def _artifact_metadata(event: ArtifactEvent) -> dict[str, str | int | list[str]]:
    metadata: dict[str, str | int | list[str]] = {
        "files": event.files,
        "bytes": event.bytes,
        "uses": event.uses,
        "stage": event.stage,
    }
    if event.path is not None:
        metadata["path"] = event.path
    if event.manifest_sha256 is not None:
        metadata["manifest_sha256"] = event.manifest_sha256
    return metadata
