"""What clips cost on their way to the VAE, and batches on theirs to a step, is measured, at toy size."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cogflow.benchmarking.prepare_cost import OURS
from cogflow.config.compose import compose
from cogflow.data.shapes import draw, scenes
from cogflow.data.video import write_video
from cogflow.errors import ConfigError, DataError
from cogflow.stages import load

PEER = """
import torch
class T2VDatasetWithResize(torch.utils.data.Dataset):
    def __init__(self, data_root, caption_column, video_column, device, trainer, max_num_frames, height, width):
        from pathlib import Path
        self.videos = [Path(data_root) / line for line in (Path(data_root) / video_column).read_text().split()]
        assert all(video.is_file() for video in self.videos)
        self.cache = Path(data_root) / "cache"
        self.trainer, self.size = trainer, (SHORT + max_num_frames, height, width)
    def __len__(self):
        return len(self.videos)
    def __getitem__(self, index):
        self.cache.mkdir(exist_ok=True)
        return self.trainer.encode_video(torch.zeros(1, 3, *self.size))
"""


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """A step that is measured in this process leaves DeepSpeed's process group and its rank behind."""
    before = os.environ.get("LOCAL_RANK")
    yield
    if before is None:
        os.environ.pop("LOCAL_RANK", None)
    if dist.is_initialized():
        dist.destroy_process_group()


def measured(root: Path, *words: str) -> dict[str, Any]:
    load("benchmark").run(compose(["stage=benchmark", f"run.root={root}", "run.name=b", "tracking=off", *words]))
    return dict(json.loads((root / "b" / "benchmark.json").read_text())["results"])


def a_peer(root: Path, more: int = 0) -> Path:
    package = root / "peer" / "finetune" / "datasets"
    package.mkdir(parents=True)
    (package / "t2v_dataset.py").write_text("")
    (package / "__init__.py").write_text(PEER.replace("SHORT", str(more)))
    return root / "peer"


def clips_in(folder: Path, frames: int) -> Path:
    for number, scene in enumerate(scenes(2, seed=3)):
        write_video(folder / f"{number}.mp4", draw(scene, frames, 96, 144), 24, threads=1)
    return folder


def test_clips_that_are_written_by_part(tmp_path: Path) -> None:
    found = measured(tmp_path, "stage.what=prepare", "stage.repeats=2", "stage.contents=2", "stage.clip_height=80")
    assert len(found["seconds"][OURS]) == 2 and found["peer"] is None and len(found["clips"]) == 2
    assert "from 2 of 142x80 (h264, 24 a second)" in found["summary"]
    assert list(found["parts"])[:5] == [
        "hashing the file",
        "opening, walking through",
        "decoding",
        "colours",
        "resizing, cropping",
    ]
    assert (
        all(seconds > 0 for seconds in found["parts"].values())
        and not (tmp_path / "b" / "benchmark" / "prepare").exists()
    )


@pytest.mark.slow
def test_clips_beside_a_peer_in_a_process_of_its_own(tmp_path: Path) -> None:
    given = f"stage.clips={clips_in(tmp_path / 'clips', 30)}"
    words = ["stage.what=prepare", "stage.repeats=2", given]
    found = measured(tmp_path, *words, f"stage.vs={a_peer(tmp_path)}")
    assert found["peer"] == "CogVideo" and len(found["seconds"]["CogVideo"]) == 2 and found["times"] > 0
    with pytest.raises(DataError, match="CogVideo gave other clips than were asked for"):
        measured(tmp_path, *words, f"stage.vs={a_peer(tmp_path / 'longer', 1)}")
    (tmp_path / "peer" / "finetune" / "datasets" / "__init__.py").write_text("raise ImportError('no decord')")
    with pytest.raises(DataError, match="CogVideo's clips ended with 1: ImportError: no decord"):
        measured(tmp_path, *words, f"stage.vs={tmp_path / 'peer'}")


def test_what_cannot_be_measured_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a clone of zai-org/CogVideo nor one of a-r-r-o-w/finetrainers"):
        measured(tmp_path, "stage.what=prepare", f"stage.vs={tmp_path}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no clips"):
        measured(tmp_path, "stage.what=prepare", f"stage.clips={tmp_path / 'empty'}")
    with pytest.raises(DataError, match="a clip cannot be read: too short"):
        measured(tmp_path, "stage.what=prepare", f"stage.clips={clips_in(tmp_path / 'clips', 6)}")


@pytest.mark.slow
def test_batches_of_a_cache_beside_a_step(tmp_path: Path) -> None:
    found = measured(tmp_path, "stage.what=loader", "stage.repeats=2", "stage.steps=1", "stage.batch_size=2")
    latents = 16 * 3 * 8 * 12
    assert found["bytes"] > 2 * 4 * (2 * latents)  # latents and noise of two clips, and their text
    low, high = sorted(found["seconds"]["a batch"])
    assert low <= found["share"] * found["step"] <= high
    assert "a training step of" in found["summary"] and not (tmp_path / "b" / "benchmark" / "loader").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the step is run")
def test_a_step_that_cannot_run_here_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cogflow.benchmarking import loader_cost

    monkeypatch.setattr(loader_cost, "HELD", 2)
    monkeypatch.setattr(loader_cost, "BATCHES", 1)
    found = measured(
        tmp_path, "stage.what=loader", "model=cogvideox-5b", "data.frames=9", "data.height=480", "data.width=720"
    )
    assert "planned for a GPU" in found["step source"] and 0 < found["share"] < 1
