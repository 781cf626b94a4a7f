"""Set up all tests: one thread, no network, and caches apart from the user's.

The environment is set before anything imports torch; subprocesses inherit it.
"""

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
# A process killed while it builds an extension leaves a lock that blocks every later start, so the user's cache is not
# used.
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
# Without WANDB_MODE the settings apply: offline, or none with tracking.wandb=disabled. The service of W&B takes two
# seconds to start.
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "WANDB_API_KEY", "WANDB_MODE"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server that has imported cogflow and forks its runs."""
    with Server(tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="session")
def cogflow(server: Server) -> Command:
    """Return a function that runs cogflow with the given words on ``ranks`` processes, forked from ``server``.

    W&B is disabled unless the environment enables it, because its service starts once per run. ``started`` uses W&B.
    """

    def run(*words: str, ranks: int = 1, code: int | None = 0, timeout: int = 900) -> subprocess.CompletedProcess[str]:
        done = server.run(
            *words, ranks=ranks, seconds=timeout, env={"WANDB_MODE": "disabled"} | os.environ, cwd=str(Path.cwd())
        )
        ended = next((failed for failed in done.codes if failed), 0)
        if code is not None:
            assert ended == code and not done.timed_out, (
                f"exit codes {done.codes}\n{done.out[-3000:]}\n{done.err[-5000:]}"
            )
        return subprocess.CompletedProcess(words, ended, done.out, done.err)

    return run


@pytest.fixture(scope="session")
def prepared(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with the prepared clips of ``debug=quick``. Tests copy it, or its ``cache``."""
    root = tmp_path_factory.mktemp("clips")
    words = ["stage=prepare", "debug=quick", f"run.root={root}", "run.name=prepared", "tracking.wandb=disabled"]
    done = server.run(*words)
    assert done.codes == [0], done.text[-3000:]
    return root / "prepared"


@pytest.fixture(scope="session")
def started() -> Command:
    """Return a function that runs ``python -m cogflow`` with the given words, as users do.

    With more than one of ``ranks`` it runs under ``torchrun``.
    """

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
    """Return the root of the repository."""
    return REPOSITORY


SLOWEST = (
    "stages",
    "slurm",
    "scenarios",
    "training/test_resuming.py",
    "launch/test_launchers.py",
    "faults",
    "training",
    "benchmarks",
    "tools",
    "examples",
)
"""Files and folders of tests that take a minute or more, the longest first. They start first."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of workers of ``-n auto``: one more than there are cores.

    Tests also wait: for SLURM's time limits, for W&B's time limits and for disks.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files: those of ``SLOWEST`` first, then those with the most tests that are slow or start processes.

    Workers that take whole files then end at about the same time.
    """
    slow = Counter(
        item.path
        for item in items
        if item.get_closest_marker("slow") or {"cogflow", "server", "started"} & set(getattr(item, "fixturenames", ()))
    )

    def order(item: pytest.Item) -> tuple[int, int]:
        if not slow[item.path]:
            return len(SLOWEST), 0
        name = item.path.relative_to(REPOSITORY / "tests").as_posix()
        position = next((index for index, slowest in enumerate(SLOWEST) if name.startswith(slowest)), len(SLOWEST))
        return position, -slow[item.path]

    items.sort(key=order)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return a scheduler that gives a worker whole files, and all files that use the fixture ``flow`` to one worker.

    A worker takes a minute to run that flow.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    flow_files = {
        path.relative_to(REPOSITORY).as_posix()
        for path in REPOSITORY.glob("tests/stages/test_*.py")
        if "flow: Path" in path.read_text()
    }

    class FlowFilesTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "tests/stages with one flow" if file in flow_files else file

    return FlowFilesTogether(config, log)
