"""Files of a run folder that belong to no single package: ``<stage>.json``, heartbeats, lock, id of the W&B runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from cogflow.files.record_io import OMIT_NONE, JsonObject, RawRecord, Record


@dataclass(frozen=True)
class MachineRecord:
    """Machine that a stage ran on, without the machine's or the user's name.

    ``gpus``: their names; None where torch is not loaded.
    """

    system: str
    cpus: int | None
    processes: int
    gpus: Annotated[list[str] | None, OMIT_NONE] = None


@dataclass(frozen=True)
class StageRecord(Record):
    """``<stage>.json``: inputs with their hashes, results, settings, versions and machine of one stage of a run.

    ``status``: done, stopped or failed. ``started`` and ``finished``: UTC, ISO 8601. ``results`` may hold ``summary``
    (one short line) and ``where`` (a path), which the closing table shows.
    """

    advice: ClassVar[str] = "Run the stage again."

    stage: str
    status: str
    started: str
    finished: str
    seconds: float
    command: str
    folder: str
    inputs: JsonObject
    results: JsonObject
    settings: JsonObject
    versions: dict[str, str]
    machine: MachineRecord

    @property
    def summary(self) -> str:
        """One line about the results; empty where the stage gave none."""
        return str(self.results.get("summary") or "")


@dataclass(frozen=True)
class RunSource(Record):
    """``source.json`` of a run that a stage made for one source: the absolute path of the source.

    ``stage``: the stage that made the run.
    """

    file_name: ClassVar[str] = "source.json"

    stage: str
    source: str


@dataclass(frozen=True)
class HeartbeatRecord(Record):
    """``ranks/rank-00000.json``: where a rank is in its work at ``time`` (seconds since the epoch)."""

    rank: int
    host: str
    pid: int
    phase: str
    time: float

    @classmethod
    def upgrade(cls, values: RawRecord, version: int) -> RawRecord:
        """Version 0 names the phase ``what``."""
        return {**values, "phase": values["what"]}


@dataclass(frozen=True)
class LockRecord(Record):
    """``lock/000001.json``: the process that may write into the run folder, or the last one that did.

    ``boot``: id of the boot of the host. ``pid_namespace``: name of the namespace that ``pid`` belongs to.
    ``process_start``: start of the process in clock ticks since the boot. ``inode``: that of this file; a copy of the
    run folder has another. ``job``: id of the SLURM job. ``since``: UTC, ISO 8601; for the user, it is compared with
    nothing. ``renewals``: grows every few seconds while the process lives. ``released``: the process has ended its
    work.
    """

    advice: ClassVar[str] = "It is replaced by the next command that writes into the run folder."

    host: str
    boot: str | None
    pid_namespace: str | None
    pid: int
    process_start: int | None
    inode: int
    job: str | None
    command: str
    since: str
    renewals: int = 0
    released: bool = False

    @property
    def holder(self) -> str:
        """Process that holds the lock, in words."""
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


@dataclass(frozen=True)
class RunToken(Record):
    """``wandb/id.json``: a random name of the run folder, for ids of W&B runs."""

    file_name: ClassVar[str] = "id.json"

    id: str
