"""One real flow on the tiny model, run once by the command line and looked at by many tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]


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
def flow(cogflow: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of ``stage=flow debug=quick``; tests must not change it."""
    root = tmp_path_factory.mktemp("runs")
    cogflow("stage=flow", "debug=quick", f"run.root={root}", "run.name=flow")
    return root / "flow"


def lines(folder: Path, name: str = "train/loss") -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that hold ``name``."""
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if name in line]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of a run, exactly as computed."""
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in lines(folder)]
