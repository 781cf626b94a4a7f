"""One thread, no network, nothing shared with the user's own caches: set before anything imports torch, inherited by subprocesses."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]

REPOSITORY = Path(__file__).resolve().parent.parent

_cache = tempfile.mkdtemp(prefix="cogflow-cache-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
_extensions = tempfile.mkdtemp(prefix="cogflow-extensions-")
# A process killed while it builds an extension leaves a lock that would hang every later start: not in the user's cache.
atexit.register(shutil.rmtree, _extensions, ignore_errors=True)

os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    TORCH_EXTENSIONS_DIR=_extensions,
    XDG_CACHE_HOME=_cache,
    PYTHONPATH=os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
)
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "WANDB_API_KEY"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def cogflow() -> Command:
    """Runs ``python -m cogflow`` with the words given, under ``torchrun`` when ``ranks`` is more than 1."""

    def run(*words: str, ranks: int = 1, code: int | None = 0, timeout: int = 900) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-m"]
        if ranks > 1:
            start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        done = subprocess.run([*start, "cogflow", *words], capture_output=True, text=True, timeout=timeout, env=dict(os.environ))
        if code is not None:
            assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        return done

    return run


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most tests that are slow or start processes first: two workers that take whole files end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow") or "cogflow" in getattr(item, "fixturenames", ()))
    items.sort(key=lambda item: -slow[item.path])
