"""One thread, no network, nothing shared with the user's own caches: set before anything imports torch, inherited by subprocesses."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.server import Server

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
    WANDB_SILENT="true",
    TORCH_EXTENSIONS_DIR=_extensions,
    XDG_CACHE_HOME=_cache,
    PYTHONPATH=os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
)
# Without a mode the settings' own holds: offline, and none where a test says tracking.wandb=disabled, whose service takes two seconds.
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "WANDB_API_KEY", "WANDB_MODE"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="session")
def cogflow(server: Server) -> Command:
    """Runs cogflow with the words given, on ``ranks`` processes, each forked from one that has imported everything already.

    Without W&B, unless the environment asks for it: its service is started for each run, and ``started`` has it."""

    def run(*words: str, ranks: int = 1, code: int | None = 0, timeout: int = 900) -> subprocess.CompletedProcess[str]:
        done = server.run(
            *words, ranks=ranks, seconds=timeout, env={"WANDB_MODE": "disabled"} | os.environ, cwd=os.getcwd()
        )
        ended = next((one for one in done.codes if one), 0)
        if code is not None:
            assert ended == code and not done.timed_out, (
                f"exit codes {done.codes}\n{done.out[-3000:]}\n{done.err[-5000:]}"
            )
        return subprocess.CompletedProcess(words, ended, done.out, done.err)

    return run


@pytest.fixture(scope="session")
def started() -> Command:
    """Runs ``python -m cogflow`` with the words given, under ``torchrun`` when ``ranks`` is more than 1: as users start it."""

    def run(*words: str, ranks: int = 1, code: int | None = 0, timeout: int = 900) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-m"]
        if ranks > 1:
            start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        done = subprocess.run(
            [*start, "cogflow", *words], capture_output=True, text=True, timeout=timeout, env=dict(os.environ)
        )
        if code is not None:
            assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        return done

    return run


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


SLOWEST = (
    "stages",
    "training/test_resuming.py",
    "faults/test_soak.py",
    "scenarios",
    "slurm",
    "faults",
    "training",
    "planning",
)
"""Where a minute or more goes, files and folders of tests: those first, the longest at the head."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, then those with the most tests that are slow or start processes: two workers that take whole files end at about
    the same time."""
    slow = Counter(
        item.path for item in items if item.get_closest_marker("slow") or "cogflow" in getattr(item, "fixturenames", ())
    )

    def place(item: pytest.Item) -> tuple[int, int]:
        if not slow[item.path]:
            return len(SLOWEST), 0
        name = item.path.relative_to(REPOSITORY / "tests").as_posix()
        return next((place for place, one in enumerate(SLOWEST) if name.startswith(one)), len(SLOWEST)), -slow[
            item.path
        ]

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files, and all those that look at one flow together: it takes a worker a minute to run it."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    around = {
        path.relative_to(REPOSITORY).as_posix()
        for path in REPOSITORY.glob("tests/stages/test_*.py")
        if "flow: Path" in path.read_text()
    }

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "tests/stages around one flow" if file in around else file

    return Together(config, log)
