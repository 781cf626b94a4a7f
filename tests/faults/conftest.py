"""Fixtures of fault tests: runs that a server forks, and helpers to compare them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cogflow.training.reshard import SavedAdamStates
from cogflow.weights.zero import MOMENTS
from tests import small
from tests.faults.server import Done, Server
from tests.training.resuming import parameter_names


class World:
    """Runs below one folder, all on the same prepared clips."""

    def __init__(self, root: Path, server: Server, prepared: Path, model: Path | None = None) -> None:
        """``prepared``: a run whose clips are used. ``model``: the trained pipeline; by default the small one."""
        self.root, self.server, self.model = root, server, model or small.pipeline(root / "model")
        shutil.copytree(prepared, root / "prepared")

    def words(self, name: str, *more: str, stage: str = "train") -> list[str]:
        """Return words that train in the run ``name``, which is created with the prepared clips if it is missing."""
        folder = self.root / name
        if not folder.exists():
            folder.mkdir()
            shutil.copytree(self.root / "prepared" / "cache", folder / "cache")
        return [
            f"stage={stage}",
            "debug=quick",
            f"run.root={self.root}",
            f"run.name={name}",
            "tracking.wandb=disabled",
            "stage.batch_size=1",
            "stage.gradient_accumulation=2",
            "stage.sample_every=0",
            "stage.evaluate_every=0",
            "stage.keep_last=99",
            f"model.path={self.model}",
            *more,
        ]

    def train(self, name: str, *more: str, **order: Any) -> Done:
        return self.server.run(*self.words(name, *more), **order)

    def checkpoints(self, name: str) -> list[int]:
        return sorted(int(path.name[5:]) for path in (self.root / name / "checkpoints").glob("step-*"))

    def pointer(self, name: str) -> int | None:
        path = self.root / name / "checkpoints" / "latest.json"
        return int(json.loads(path.read_text())["step"]) if path.is_file() else None

    def losses(self, name: str) -> dict[int, tuple[float, float]]:
        """Return loss and gradient norm by step, exactly as computed."""
        lines = [json.loads(line) for line in (self.root / name / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: (line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line}

    def states(self, name: str, step: int) -> dict[str, bytes]:
        """Return master weights and moments of every parameter at a checkpoint, and Adam's step count."""
        folder = self.root / name / "checkpoints" / f"step-{step:06d}"
        names = parameter_names(folder)
        saved = SavedAdamStates(folder / "deepspeed" / "state", names)
        found = {
            f"{one} {key}": saved.read(one, key).contiguous().numpy().tobytes()
            for one in names
            for key in ("fp32", *MOMENTS)
        }
        return found | {"steps": str(saved.steps).encode()}


@pytest.fixture(scope="module")
def world(server: Server, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return a folder of runs for each test file, so that names of runs do not collide."""
    return World(tmp_path_factory.mktemp("faults"), server, prepared)


def server_says(done: Done, code: int, *texts: str) -> Done:
    """Assert that ``done`` ended with ``code`` on rank 0 and printed all of ``texts``; return it."""
    assert done.code == code and not done.timed_out, f"exit code {done.codes}, expected {code}\n{done.text[-4000:]}"
    for text in texts:
        assert text in done.text, f"{text!r} is not printed:\n{done.text[-4000:]}"
    return done
