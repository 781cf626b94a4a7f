"""Run cogflow many times without starting Python each time.

The server process has imported everything, and forks one process for each run and rank. Each process has its own
signals, limits and file descriptors. ``python -m tests.faults.server`` reads one JSON object a line: an :class:`Order`,
which it answers with process ids, or process ids, which it answers with their end. :class:`Server` is the client.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Order:
    """One run. ``fault``: see :mod:`tests.faults.injected`. ``largest_file``: bytes that no file of it may exceed.

    ``seconds``: then all is killed. ``program``: the module whose ``main`` takes the words; cogflow's own and the
    tests'.
    """

    words: Sequence[str]
    log: str
    fault: str = ""
    ranks: int = 1
    largest_file: int | None = None
    seconds: float = 120.0
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = "."
    program: str = "cogflow.cli"


@dataclass(frozen=True)
class Done:
    """``codes``: of each rank, negative for the signal that killed it.

    ``out``, ``err``: what all of them wrote, rank by rank. ``fired``: faults that did.
    """

    codes: list[int]
    out: str
    err: str
    fired: list[str]
    seconds: float
    timed_out: bool

    @property
    def code(self) -> int:
        """Return the exit code of rank 0."""
        return self.codes[0]

    @property
    def text(self) -> str:
        """Return all output, standard error first."""
        return self.err + self.out


@dataclass(frozen=True)
class Running:
    """A run that was started and not waited for. ``pids``: of its ranks."""

    pids: list[int]
    log: str


class Server:
    """The client side; use it as a context manager. ``folder``: for logs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        env = dict(os.environ) | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}  # a service to start each time
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=60)

    def run(self, *words: str, **order: Any) -> Done:
        """Run once and wait for the end."""
        return self.wait(self.start(*words, **order), order.get("seconds", Order.seconds))

    def start(self, *words: str, **order: Any) -> Running:
        """Start a run beside others; :meth:`wait` returns its end."""
        self._count += 1
        log = str(self.folder / f"run-{self._count:04d}")
        return Running(self._ask(asdict(Order(words, log, **order))), log)

    def wait(self, running: Running, seconds: float = 120.0) -> Done:
        """Return the end of a run. It is killed after ``seconds``."""
        answer = self._ask({"pids": running.pids, "seconds": seconds})
        log = Path(running.log)
        out, err = (
            "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"{log.name}.*.{kind}")))
            for kind in ("out", "err")
        )
        fired = Path(f"{log}-fired")
        return Done(out=out, err=err, fired=fired.read_text().split() if fired.is_file() else [], **answer)

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def serve() -> None:
    """Answer requests: the server side."""
    # Libraries also print to standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 - initialize() does, and it takes seconds
    import diffusers  # noqa: F401
    import transformers  # noqa: F401
    import wandb  # noqa: F401

    import cogflow.assemble.pipeline_folder
    import cogflow.cli
    import cogflow.stages.export
    import cogflow.stages.prepare
    import cogflow.stages.train

    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        cogflow.cli.main(["--cfg", "stage=train", "debug=quick"])  # Hydra's own imports, too
    # The garbage collection of a run would else scan half a million imported objects and copy their memory pages.
    gc.collect()
    gc.freeze()
    began: dict[int, float] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "words" in question:
            answer: Any = _start(Order(**question))
            began[answer[0]] = time.monotonic()
        else:
            codes, timed_out = _wait(question["pids"], question["seconds"])
            seconds = time.monotonic() - began.pop(question["pids"][0])
            answer = {"codes": codes, "seconds": seconds, "timed_out": timed_out}
        print(json.dumps(answer), file=answers, flush=True)


def _start(order: Order) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(order.ranks):
        pid = os.fork()
        if pid == 0:
            try:
                _run(order, rank, port)
            except BaseException:  # noqa: BLE001 - nothing may go on in the server's place
                traceback.print_exc()
            finally:
                os._exit(99)
        pids.append(pid)
    return pids


def _run(order: Order, rank: int, port: int) -> None:
    os.setsid()
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{order.log}.{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(order.env)
    os.chdir(order.cwd)
    sys.argv = ["cogflow", *order.words]
    if order.ranks > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(order.ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    if order.largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.largest_file, order.largest_file))
    from tests.faults import injected

    injected.arm(order.fault, rank, Path(f"{order.log}-fired"))
    code = importlib.import_module(order.program).main(order.words) or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(pids: list[int], seconds: float) -> tuple[list[int], bool]:
    """Return the exit codes in order; kill what still runs after ``seconds``."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    killed = False
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
        if len(codes) < len(pids) and time.monotonic() > deadline and not killed:
            killed = True
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids], killed


if __name__ == "__main__":
    serve()
