"""One cluster, clips prepared once, and what an undisturbed training of two ranks gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing

STEPS = 6
SETTINGS = [
    "debug=quick", "tracking=off", f"stage.steps={STEPS}", "stage.sample_every=0", "stage.evaluate_every=0", "stage.batch_size=2",
]  # fmt: skip
Words = Callable[..., list[str]]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="session")
def clips(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose clips all others train on; its name is ``clips``."""
    root = tmp_path_factory.mktemp("runs")
    cogflow("stage=prepare", "debug=quick", "tracking=off", f"run.root={root}", "run.name=clips")
    return root / "clips"


@pytest.fixture(scope="session")
def words(clips: Path) -> Words:
    """Words of a run of its own on these clips, without the stage."""

    def beside(name: str, *more: str) -> list[str]:
        if name != clips.name:
            shutil.copytree(clips / "cache", clips.parent / name / "cache")
        given = {word.split("=")[0] for word in more}
        settings = [word for word in SETTINGS if word.split("=")[0] not in given]
        return [*settings, f"run.root={clips.parent}", f"run.name={name}", f"data.path={clips / 'data'}", *more]

    return beside


@pytest.fixture(scope="session")
def undisturbed(clips: Path, words: Words) -> Path:
    """The run folder of two ranks that nobody stops, started by torchrun alone."""
    cogflow("stage=train", *words("undisturbed"), ranks=2)
    return clips.parent / "undisturbed"


def cogflow(*words: str, ranks: int = 1) -> None:
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    done = subprocess.run([*start, "cogflow", *words], capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


def steps(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of a run, exactly as computed."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line]


def weights(run: Path) -> bytes:
    return (run / f"checkpoints/step-{STEPS:06d}/transformer/diffusion_pytorch_model.safetensors").read_bytes()
