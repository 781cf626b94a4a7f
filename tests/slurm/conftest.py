"""Fixtures: one cluster, clips prepared once, and an uninterrupted training on two ranks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.server import Server
from tests.slurm.cluster import Cluster, missing

STEPS = 6
SETTINGS = [
    "debug=quick",
    "tracking=off",
    f"stage.steps={STEPS}",
    "stage.sample_every=0",
    "stage.evaluate_every=0",
    "stage.batch_size=2",
]
Words = Callable[..., list[str]]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        # Where these tests are required, a skip is a failure.
        (pytest.fail if os.environ.get("COGFLOW_REQUIRE_SLURM") else pytest.skip)(reason)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run on two ranks, on the clips of the run ``clips`` beside it."""
    root = tmp_path_factory.mktemp("runs")
    words = ["debug=quick", "tracking=off", f"run.root={root}"]
    done = server.run("stage=prepare", *words, "run.name=clips")
    assert done.code == 0, done.text[-5000:]
    shutil.copytree(root / "clips/cache", root / "undisturbed/cache")
    more = [*SETTINGS[2:], f"data.path={root / 'clips/data'}", "run.name=undisturbed"]
    done = server.run("stage=train", *words, *more, ranks=2)
    assert done.codes == [0, 0], done.text[-5000:]
    return root / "undisturbed"


@pytest.fixture(scope="session")
def clips(undisturbed: Path) -> Path:
    """Return the run whose clips all others train on."""
    return undisturbed.parent / "clips"


@pytest.fixture(scope="session")
def words(clips: Path) -> Words:
    """Return words of another run on these clips, without the stage."""

    def beside(name: str, *more: str) -> list[str]:
        if name != clips.name:
            shutil.copytree(clips / "cache", clips.parent / name / "cache")
        given = {word.split("=")[0] for word in more}
        settings = [word for word in SETTINGS if word.split("=")[0] not in given]
        return [*settings, f"run.root={clips.parent}", f"run.name={name}", f"data.path={clips / 'data'}", *more]

    return beside


def steps(run: Path) -> list[tuple[int, float, float]]:
    """Return (step, loss, gradient norm) of each step of a run, exactly as computed."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line]


def weights(run: Path) -> bytes:
    return (run / f"checkpoints/step-{STEPS:06d}/transformer/diffusion_pytorch_model.safetensors").read_bytes()
