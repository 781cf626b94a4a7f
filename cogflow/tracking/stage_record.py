"""<run>/<stage>.json: what a stage was given, what it ran on, and what came of it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cogflow
from cogflow.config.schema import AnyConfig
from cogflow.files.atomic_write import write_json
from cogflow.tracking.secrets import scrub

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


def write_record(
    folder: Path,
    stage: str,
    config: AnyConfig,
    inputs: Mapping[str, Any],
    results: Mapping[str, Any],
    *,
    started: float | None = None,
    status: str = "done",
) -> Path:
    """Write ``folder/<stage>.json`` atomically and return its path.

    ``inputs`` names what the stage read, with hashes. ``results`` is what came of it; the report's closing table shows its
    ``summary`` (one short line) and ``where`` (a path) when they are there. ``started`` is ``time.time()`` at the stage's start
    (without it: of the process). ``status``: done, stopped or failed. Secrets are replaced by ``***``.
    """
    finished = time.time()
    begun = process_start() if started is None else started
    record = {
        "stage": stage,
        "status": status,
        "started": _stamp(begun),
        "finished": _stamp(finished),
        "seconds": round(finished - begun, 3),
        "command": command_line(),
        "folder": str(folder),
        "inputs": plain(inputs),
        "results": plain(results),
        "settings": plain(config),
        "versions": versions(),
        "machine": machine(),
    }
    path = folder / f"{stage}.json"
    write_json(path, scrub(record))
    return path


def command_line() -> str:
    """The command that started this process, as one would type it again."""
    argv = list(sys.argv)
    if argv and argv[0].endswith(os.path.join("cogflow", "__main__.py")):
        return shlex.join(["python", "-m", "cogflow", *argv[1:]])
    return shlex.join(argv)


def versions() -> dict[str, str]:
    """Versions of cogflow, Python and the packages that matter; packages that are absent are left out."""
    found = {"cogflow": cogflow.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = _commit()
    return found | ({"commit": commit} if commit else {})


def machine() -> dict[str, Any]:
    """What the work ran on, without the machine's or the user's name."""
    facts: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "cpus": os.cpu_count()}
    facts["processes"] = int(os.environ.get("WORLD_SIZE", "1"))
    torch = sys.modules.get("torch")  # a stage that never needed torch shall not load it for its record
    if torch is not None and torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return facts


def plain(value: Any) -> Any:
    """``value`` as JSON types: dataclasses become dicts, paths strings, numpy and torch scalars numbers, the rest ``str``."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "shape", None) in ((), [], None):
        return plain(item())
    return str(value)


def process_start() -> float:
    """``time.time()`` at which this process began; on systems that do not tell, when this module was loaded."""
    return _STARTED


def _process_start() -> float:
    try:
        # Field 22 of /proc/self/stat counts clock ticks since boot; the name in field 2 may hold spaces, so split behind it.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()


_STARTED = _process_start()


def _stamp(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def _commit() -> str | None:
    """The commit of the checkout that cogflow runs from, marked when files differ from it; ``None`` when installed."""
    source = Path(cogflow.__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(source)]
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed.stdout.strip() else "")
