"""Write ``<run>/<stage>.json``: inputs, settings, versions, machine and results of a stage."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

import cogflow
from cogflow import rank_identity
from cogflow.config.command import typed_command
from cogflow.config.config import AnyConfig
from cogflow.files.record_io import JsonValue, write_record
from cogflow.files.secrets import scrub, scrub_text
from cogflow.records.run_records import MachineRecord, StageRecord

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "deepspeed",
    "safetensors",
    "numpy",
    "av",
    "hydra-core",
    "wandb",
)

NamedValues: TypeAlias = Mapping[str, object]
"""Inputs or results by name. The values are anything that :func:`to_json` converts."""


def write_stage_record(
    folder: Path,
    stage: str,
    config: AnyConfig,
    inputs: NamedValues,
    results: NamedValues,
    *,
    started: float | None = None,
    status: str = "done",
) -> Path:
    """Write ``folder/<stage>.json`` in one step and return its path.

    ``inputs`` names what the stage read, with hashes. ``results``: the report's closing table shows its ``summary``
    (one short line) and ``where`` (a path). ``started``: ``time.time()`` at the stage's start; by default at the
    process's start. ``status``: done, stopped or failed. Secrets are replaced by ``***``.
    """
    finished = time.time()
    begun = PROCESS_START if started is None else started
    record = StageRecord(
        stage=stage,
        status=status,
        started=_utc(begun),
        finished=_utc(finished),
        seconds=round(finished - begun, 3),
        command=shown_command(),
        folder=str(folder),
        inputs=scrub(to_json_object(inputs)),
        results=scrub(to_json_object(results)),
        settings=scrub(to_json_object(asdict(config))),
        versions=package_versions(),
        machine=describe_machine(),
    )
    path = folder / f"{stage}.json"
    write_record(path, record)
    return path


def command_line() -> str:
    """Return the command that started this process, as a user would type it."""
    return typed_command(sys.argv)


def shown_command() -> str:
    """Return the command that started this process, with secrets replaced by ``***``."""
    return scrub_text(command_line())


def package_versions() -> dict[str, str]:
    """Return the versions of cogflow, Python and :data:`PACKAGES`; packages that are not installed are left out."""
    found = {"cogflow": cogflow.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = _commit()
    return found | ({"commit": commit} if commit else {})


def describe_machine() -> MachineRecord:
    """Return what the work runs on."""
    torch = sys.modules.get("torch")  # a stage that does not need torch shall not load it for its record
    gpus: list[str] | None = None
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return MachineRecord(
        system=f"{platform.system()} {platform.machine()}",
        cpus=os.cpu_count(),
        processes=rank_identity.world_size(),
        gpus=gpus,
    )


def to_json(value: object) -> JsonValue:
    """Return ``value`` as JSON types: dataclasses as objects, numpy and torch scalars as numbers, others by ``str``."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_json(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(inner) for inner in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "shape", None) in ((), [], None):
        return to_json(item())
    return str(value)


def to_json_object(values: NamedValues) -> dict[str, JsonValue]:
    """Return ``values`` with each value as :func:`to_json` gives it."""
    return {str(name): to_json(value) for name, value in values.items()}


def _process_start() -> float:
    """Return ``time.time()`` at which this process began; the present time on systems without ``/proc``."""
    try:
        # Field 22 of /proc/self/stat counts clock ticks since boot. Field 2, a name, may hold spaces: split after it.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()


PROCESS_START = _process_start()


def _utc(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def _commit() -> str | None:
    """Return the commit of the checkout that cogflow runs from, marked when files differ; None when installed."""
    source = Path(cogflow.__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    try:
        commit = _git(source, "rev-parse", "HEAD")
        changes = _git(source, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
