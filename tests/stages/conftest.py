"""Fixture of a real flow on the tiny model, run once by the command line and shared by many tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command

GROUP_WRITES = 0o002
"""The umask of the flow: its group may write what it makes."""


@pytest.fixture(scope="session")
def flow(started: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of ``stage=flow debug=quick``; tests must not change it."""
    root = tmp_path_factory.mktemp("runs")
    before = os.umask(GROUP_WRITES)
    try:
        started("stage=flow", "debug=quick", f"run.root={root}", "run.name=flow")
    finally:
        os.umask(before)
    return root / "flow"


def lines(folder: Path, name: str = "train/loss") -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl`` that contain ``name``."""
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if name in line]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """Return (step, loss, gradient norm) of each step of a run, exactly as computed."""
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in lines(folder)]
