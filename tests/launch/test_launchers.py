"""``launch/torchrun.sh`` and ``launch/hostfile.sh`` with real ranks.

A signal to the script stops training, and the script returns the exit code of training.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PATIENCE = 180


class Launched:
    """A running launcher. Its output goes to ``log``."""

    def __init__(self, script: Path, log: Path, words: list[str], env: dict[str, str]) -> None:
        self.log = log
        given = {**os.environ, "COGFLOW_PYTHON": sys.executable, "WANDB_MODE": "disabled", **env}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                ["bash", script, *words],
                env=given,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                preexec_fn=restore_sigint,
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")[-5000:]

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until ``condition()`` is true. Fail when the launcher ends first or time is over."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def code(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.text()) from None


def restore_sigint() -> None:
    """Tests that are run in the background ignore Ctrl-C, and a shell cannot trap what was ignored when it began."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Place:
    """Launchers of runs below one folder. All train on the clips of the run ``clips``."""

    def __init__(self, root: Path, launch: Path) -> None:
        self.root = root
        self.launch = launch
        self.all: list[Launched] = []

    def start(self, script: str, name: str, **env: str) -> Launched:
        log = self.root / f"{len(self.all)}.log"
        if name != "clips" and not (self.root / name).exists():
            shutil.copytree(self.root / "clips/cache", self.root / name / "cache")
        words = [
            "debug=quick",
            "tracking=off",
            f"run.root={self.root}",
            f"run.name={name}",
            f"data.path={self.root / 'data'}",
        ]
        if env.get("STAGE", "train") == "train":
            words += [
                "stage.steps=5000",
                "stage.save_every=0",
                "stage.sample_every=0",
                "stage.evaluate_every=0",
                "stage.batch_size=1",
            ]
        self.all.append(Launched(self.launch / script, log, words, env))
        return self.all[-1]

    def trains(self, name: str) -> bool:
        path = self.root / name / "metrics.jsonl"
        return path.exists() and "train/loss" in path.read_text()

    def checkpoint(self, name: str) -> tuple[int, int]:
        """Return the step and the number of ranks of the only checkpoint of a run."""
        (folder,) = (self.root / name / "checkpoints").glob("step-*")
        trainer = json.loads((folder / "trainer.json").read_text())
        return int(trainer["step"]), int(trainer["layout"]["world size"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("runs"), repository / "launch")
    prepared = place.start("torchrun.sh", "clips", STAGE="prepare", GPUS="1")
    assert prepared.code() == 0, prepared.text()
    yield place
    for pid in running(place.root):  # left by a test that failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_signal_stops_torchrun_on_one_node(place: Place) -> None:
    training = place.start("torchrun.sh", "one", GPUS="2")
    training.until(lambda: place.trains("one"))
    training.process.send_signal(signal.SIGTERM)
    assert training.code() == 75 and "Stopped after step" in training.text(), training.text()
    step, ranks = place.checkpoint("one")
    assert 0 < step < 5000 and ranks == 2


def test_a_signal_to_one_node_stops_torchrun_on_both(place: Place) -> None:
    env = {"NODES": "2", "MASTER": f"127.0.0.1:{free_port()}", "GPUS": "1"}
    nodes = [place.start("torchrun.sh", "two", **env) for _ in range(2)]
    nodes[0].until(lambda: place.trains("two"))
    nodes[1].process.send_signal(signal.SIGINT)
    assert [node.code() for node in nodes] == [75, 75], nodes[0].text() + nodes[1].text()
    step, ranks = place.checkpoint("two")
    assert 0 < step < 5000 and ranks == 2


def test_a_signal_stops_both_hosts_of_a_hostfile(place: Place) -> None:
    """A stand-in for ssh runs the command here, as ssh does: in a shell, another folder, a new environment."""
    hostfile, ssh = place.root / "hostfile", place.root / "ssh"
    hostfile.write_text("# two hosts\nfirst slots=1\n\nsecond slots=1  # the last\n")
    ssh.write_text(
        f'#!/bin/bash\necho "$1" >>{place.root}/reached\nshift\ncd /\n'
        'exec env -i PATH="$PATH" HOME="$HOME" bash -c "$*"\n'
    )
    ssh.chmod(0o755)
    port = str(free_port())
    training = place.start(
        "hostfile.sh", "hosts", HOSTFILE=str(hostfile), REMOTE=str(ssh), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    training.until(lambda: place.trains("hosts"))
    assert sorted((place.root / "reached").read_text().split()) == ["first", "second"]
    training.process.send_signal(signal.SIGUSR1)
    assert training.code() == 75 and "Stopped after step" in training.text(), training.text()
    step, ranks = place.checkpoint("hosts")
    assert 0 < step < 5000 and ranks == 2


def test_a_second_signal_ends_the_launcher_at_once(place: Place) -> None:
    """The first signal comes before training has its handlers; it is not lost and does not kill training."""
    training = place.start("torchrun.sh", "twice", GPUS="1")
    training.until(lambda: running(place.root, "twice"))
    training.process.send_signal(signal.SIGTERM)
    time.sleep(4.5)
    began = time.monotonic()
    training.process.send_signal(signal.SIGTERM)
    assert training.code() == 128 + signal.SIGTERM and "at once" in training.text(), training.text()
    assert time.monotonic() - began < 30 and not running(place.root, "twice")
    assert not (place.root / "twice/checkpoints").exists()


def running(root: Path, name: str = "") -> list[int]:
    """Return the processes of the runs below ``root``, launchers and ranks; with ``name`` the rank 0 of that run."""
    found = []
    wanted = {f"run.root={root}".encode(), *([b"cogflow", f"run.name={name}".encode()] if name else [])}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words, known = ((path / file).read_bytes().split(b"\0") for file in ("cmdline", "environ"))
            if wanted <= set(words) and (not name or b"COGFLOW_RANK=0" in known):
                found.append(int(path.name))
    return found
