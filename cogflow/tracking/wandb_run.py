"""The one place that calls Weights & Biases. Whatever it raises becomes one warning; the work goes on without it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cogflow.runtime.console import echo
from cogflow.tracking.wandb_service import Caller, NoAnswer, end_service, within

INIT_SECONDS = 30.0
"""How long an online run may take to be accepted before it goes on offline."""

FINISH_SECONDS = 300.0
"""How long the last uploads may take. What is not sent by then stays on disk for ``wandb sync``."""

USE_SECONDS = 30.0
"""How long W&B may look for an input artifact on its server."""

CALL_SECONDS = 30.0
"""How long its service may take for a row, a picture or an alert: it only takes them over, whatever the network does."""

ARTIFACT_SECONDS = 120.0
"""How long it may take for an artifact, of which it asks its server."""

MOST_FAILURES = 3
"""After this many failed calls W&B is left alone."""

SETTINGS: dict[str, Any] = {
    "silent": True,
    "console": "off",
    # Neither code nor git remotes nor the command's raw words are taken: our records say what is needed, without secrets.
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "init_timeout": INIT_SECONDS,
    "login_timeout": 5.0,
    "finish_timeout": FINISH_SECONDS,
}
"""Those that the installed W&B knows are set."""

T = TypeVar("T")


class WandbRun:
    """One W&B run that may be absent: ``run`` is ``None`` when W&B is disabled or has failed."""

    alive = 0
    """Runs of this process that have begun and not ended."""

    def __init__(
        self,
        *,
        mode: str,
        folder: Path,
        run_id: str,
        project: str,
        entity: str | None,
        group: str,
        job_type: str,
        config: dict[str, Any],
    ) -> None:
        self.run: Any = None
        self.online = False
        self._failures = 0
        self.last_step = 0
        self._axes: set[str] = set()
        if mode == "disabled":
            return
        self._caller = Caller()

        def start(online: bool, run_id: str = run_id) -> Any:
            import wandb

            # Read anew: W&B remembers the address that held when it was first asked for anything.
            address = {"base_url": os.environ["WANDB_BASE_URL"]} if os.environ.get("WANDB_BASE_URL") else {}
            known = {name: value for name, value in (SETTINGS | address).items() if name in wandb.Settings.model_fields}
            return wandb.init(
                mode="online" if online else "offline",
                dir=str(folder),
                id=run_id,
                resume="allow",
                reinit="create_new",  # flow's stages share a process: never be handed another stage's open run
                project=project,
                entity=entity,
                group=group,
                job_type=job_type,
                name=f"{group} {job_type}",
                config=config,
                settings=wandb.Settings(**known),
            )

        if mode == "online":
            self.run = self._try("could not be reached; going on offline", lambda: start(True))
            self.online = self.run is not None
        if self.run is None:
            again = self._free(run_id) if mode == "online" else run_id
            self.run = self._try("could not start; going on without it", lambda: start(False, again))
        if self.run is not None:
            WandbRun.alive += 1
            self.last_step = self._try("did not tell its step", lambda: int(self.run.step)) or 0
            self.define("train", "heldout", "sharpness", "samples")

    def _free(self, run_id: str) -> str:
        """An id to go on with offline: W&B's service holds on to the one that could not go online until it is ended."""
        if WandbRun.alive:  # ending it would end other stages' runs, too
            return f"{run_id}-offline"
        end_service(at_once=True)
        return run_id

    @property
    def place(self) -> str:
        """The run's page when online, else the folder of its files; empty without a run."""
        if self.run is None:
            return ""
        run = self.run
        return (
            self._try("did not tell its place", lambda: str((self.online and run.url) or run.settings.sync_dir)) or ""
        )

    def define(self, *prefixes: str) -> None:
        """Draw what is named ``prefix/...`` over our ``step``, not over W&B's own count of calls."""
        fresh = [prefix for prefix in prefixes if prefix not in self._axes]
        if not fresh:
            return

        def declare() -> None:
            if not self._axes:
                self.run.define_metric("step", hidden=True)
            for prefix in fresh:
                self._axes.add(prefix)
                self.run.define_metric(f"{prefix}/*", step_metric="step")

        self.call("did not take the step axis", declare)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record ``values`` (scalars or W&B media) at ``step``. It is handed over: training does not wait for it."""
        if self.run is None:
            return
        self.define(*{name.partition("/")[0] for name in values if "/" in name})
        # W&B drops rows that go back. After a rewind our steps do, so its count runs on by one while "step" tells the truth.
        self.last_step = step if step >= self.last_step else self.last_step + 1
        self._look_back()
        if (run := self.run) is not None:
            count = self.last_step
            self._caller.hand("did not take a row", lambda: run.log({"step": step} | values, step=count))

    def media(self, kind: str, path: Path, caption: str = "") -> Any:
        """``path`` as W&B's Video or Image, or ``None``."""

        def wrap() -> Any:
            import wandb

            if kind == "video":
                return wandb.Video(str(path), caption=caption or None, format=path.suffix.lstrip(".") or "mp4")
            return wandb.Image(str(path), caption=caption or None)

        return self.call(f"did not take {path.name}", wrap)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
        """A W&B table; cells that are paths of videos or pictures become playable."""

        def cell(value: Any) -> Any:
            if isinstance(value, Path):
                kind = {".mp4": "video", ".webm": "video", ".png": "image", ".jpg": "image"}.get(value.suffix.lower())
                return self.media(kind, value) if kind and value.is_file() else str(value)
            return value

        def build() -> Any:
            import wandb

            return wandb.Table(
                columns=list(columns), data=[[cell(value) for value in row] for row in rows], allow_mixed_types=True
            )

        return self.call("did not take a table", build)

    def artifact(
        self,
        name: str,
        kind: str,
        files: dict[str, Path],
        metadata: dict[str, Any],
        *,
        upload: bool,
        uses: Sequence[str],
    ) -> None:
        """Record ``files`` (name inside the artifact -> path) as a version of ``name``; by reference when not to be uploaded."""

        def build() -> None:
            import wandb

            artifact = wandb.Artifact(name, kind, metadata=metadata)
            for inside, path in files.items():
                if upload:
                    artifact.add_file(str(path), name=inside, policy="immutable", skip_cache=True)
                else:
                    artifact.add_reference(path.resolve().as_uri(), name=inside, checksum=False)
            if self.online:  # offline, W&B refuses to take an input: the lineage stands in the metadata
                for used in uses:
                    self._try(
                        f"did not find the input {used}",
                        partial(within, USE_SECONDS, partial(self.run.use_artifact, f"{used}:latest")),
                    )
            self.run.log_artifact(artifact)

        self.call(f"did not take the artifact {name}", build, ARTIFACT_SECONDS)

    def alert(self, title: str, text: str, level: str) -> None:
        self.call("did not take an alert", lambda: self.run.alert(title=title, text=text, level=level))

    def finish(self, exit_code: int) -> None:
        run, place = self.run, self.place
        if run is None:
            return
        folder = self._try("did not tell its place", lambda: str(run.settings.sync_dir)) or ""
        began = time.monotonic()
        self.call("did not finish", lambda: run.finish(exit_code=exit_code), FINISH_SECONDS + CALL_SECONDS)
        self._let_go()
        if self.online and time.monotonic() - began >= SETTINGS["finish_timeout"]:
            echo(
                f"warning: W&B did not take everything in {time.monotonic() - began:.0f} s; to upload the rest: wandb sync {folder}"
            )
        if not self.online and place:
            echo(f"W&B offline: {place} (to upload it: wandb sync {place})")

    def call(self, failure: str, action: Callable[[], T], seconds: float | None = None) -> T | None:
        """``action()``, or ``None`` and a warning. Once too much has failed, or one took longer than ``seconds`` (default
        ``CALL_SECONDS``), nothing is called any more."""
        self._look_back()
        if self.run is None:
            return None
        hung = False

        def bounded() -> T:
            nonlocal hung
            try:
                return self._caller.ask(action, CALL_SECONDS if seconds is None else seconds)
            except NoAnswer:
                hung = True
                raise

        result = self._try(failure, bounded)
        self._judge(hung)
        return result

    def _look_back(self) -> None:
        """Say what became of the rows that were handed over."""
        if self.run is None:
            return
        errors = self._caller.failed(CALL_SECONDS)
        for failure, error in errors:
            self._failed(failure, error)
        self._judge(any(isinstance(error, NoAnswer) for _, error in errors))

    def _judge(self, hung: bool) -> None:
        """Leave W&B alone when it hangs, or has failed too often."""
        if not hung and self._failures < MOST_FAILURES:
            return
        why = "does not answer" if hung else "failed too often"
        echo(f"warning: W&B {why} and is left alone; metrics.jsonl and report.html hold everything")
        self._let_go()
        if not WandbRun.alive:  # ending it would end other stages' runs, too
            end_service(at_once=hung)

    def _let_go(self) -> None:
        WandbRun.alive -= self.run is not None
        self._caller.close()
        self.run = None

    def _try(self, failure: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Exception as error:  # noqa: BLE001 - a service beside the work must never end the work, whatever it raises
            self._failed(failure, error)
            return None

    def _failed(self, failure: str, error: Exception) -> None:
        self._failures += 1
        first = (str(error).strip().splitlines() or [""])[0][:200]
        echo(f"warning: W&B {failure} ({type(error).__name__}: {first})")
