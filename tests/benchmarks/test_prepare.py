"""Test the comparison of reading clips with a peer's own dataset code, at toy size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import prepare
from cogflow.benchmarking.prepare_cost import COGFLOW
from cogflow.data.shapes import draw, scenes
from cogflow.data.video import write_video
from cogflow.errors import ConfigError, DataError

PEER = """
import torch
class T2VDatasetWithResize(torch.utils.data.Dataset):
    def __init__(self, data_root, caption_column, video_column, device, trainer, max_num_frames, height, width):
        from pathlib import Path
        self.videos = [Path(data_root) / line for line in (Path(data_root) / video_column).read_text().split()]
        assert all(video.is_file() for video in self.videos)
        self.cache = Path(data_root) / "cache"
        self.trainer, self.size = trainer, (EXTRA + max_num_frames, height, width)
    def __len__(self):
        return len(self.videos)
    def __getitem__(self, index):
        self.cache.mkdir(exist_ok=True)
        return self.trainer.encode_video(torch.zeros(1, 3, *self.size))
"""


def make_peer(root: Path, extra_frames: int = 0) -> Path:
    package = root / "peer" / "finetune" / "datasets"
    package.mkdir(parents=True)
    (package / "t2v_dataset.py").write_text("")
    (package / "__init__.py").write_text(PEER.replace("EXTRA", str(extra_frames)))
    return root / "peer"


def write_clips(folder: Path) -> Path:
    for number, scene in enumerate(scenes(2, seed=3)):
        write_video(folder / f"{number}.mp4", draw(scene, 30, 96, 144), 24, threads=1)
    return folder


def compare(root: Path, clips: Path, clone: Path) -> dict[str, Any]:
    size = ["--frames", "9", "--height", "64", "--width", "96", "--repeats", "2"]
    places = ["--folder", str(root / "work"), "--output", str(root / "prepare.json")]
    prepare.main(["--vs", str(clone), "--clips", str(clips), *size, *places])
    return dict(json.loads((root / "prepare.json").read_text()))


@pytest.mark.slow
def test_a_peer_reads_the_same_clips_in_its_own_process(tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "clips")
    found = compare(tmp_path, clips, make_peer(tmp_path))
    assert found["peer"] == "CogVideo" and found["times"] > 0
    assert len(found["seconds"]["CogVideo"]) == len(found["seconds"][COGFLOW]) == 2
    with pytest.raises(DataError, match="CogVideo returned clips of other sizes than requested"):
        compare(tmp_path, clips, make_peer(tmp_path / "longer", 1))
    (tmp_path / "peer" / "finetune" / "datasets" / "__init__.py").write_text("raise ImportError('no decord')")
    with pytest.raises(DataError, match="CogVideo's reader ended with 1: ImportError: no decord"):
        compare(tmp_path, clips, tmp_path / "peer")


def test_a_folder_that_is_no_clone_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a clone of zai-org/CogVideo nor of a-r-r-o-w/finetrainers"):
        prepare.main(["--vs", str(tmp_path)])
