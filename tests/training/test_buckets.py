"""Test training on clips of several sizes: buckets, batches of one size, and an exact resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogflow.config.data_section import DataConfig
from cogflow.data.latent_cache import LatentCache
from cogflow.data.shapes import draw_folder, fill_concepts
from tests import small
from tests.faults.conftest import World, server_says
from tests.faults.server import Server

pytestmark = pytest.mark.slow
BUCKETS = "data.buckets=[9x64x96,9x96x64,5x64x64]"
SIZES = {"wide": (9, 64, 96, 6), "tall": (9, 96, 64, 4), "short": (5, 64, 64, 3)}


def clips(folder: Path) -> Path:
    """Return a folder with clips of three sizes and one index."""
    rows = []
    for name, (frames, height, width, count) in SIZES.items():
        made = fill_concepts(DataConfig(frames=frames, height=height, width=width, clips=count, holdout=0))
        draw_folder(folder / name, made)
        for line in (folder / name / "metadata.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.append(json.dumps(row | {"file_name": f"{name}/{row['file_name']}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


class Bucketed(World):
    def __init__(self, root: Path, server: Server) -> None:
        self.root, self.server, self.model = root, server, small.pipeline(root / "model")
        self.more = [
            "data=folder",
            f"data.path={clips(root / 'clips')}",
            BUCKETS,
            "data.holdout=2",
            "data.frames=9",
            "data.height=64",
            "data.width=96",
        ]
        words = [
            "stage=prepare",
            "debug=quick",
            f"run.root={root}",
            "run.name=prepared",
            "tracking.wandb=disabled",
            *self.more,
        ]
        self.prepared = server_says(server.run(*words), 0)

    def words(self, name: str, *more: str, stage: str = "train") -> list[str]:
        return super().words(name, *self.more, *more, stage=stage)


@pytest.fixture(scope="module")
def bucketed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Bucketed:
    return Bucketed(tmp_path_factory.mktemp("buckets"), server)


def test_each_clip_is_prepared_in_its_bucket(bucketed: Bucketed) -> None:
    cache = LatentCache(bucketed.root / "prepared/cache")
    assert len(cache) == 13 and "to train on by bucket: 9x64x96 " in bucketed.prepared.text
    for place in range(len(cache)):
        frames, height, width, _ = SIZES[cache.name_of(place).split("/")[0]]
        assert cache.bucket(place) == f"{frames}x{height}x{width}"
        assert tuple(cache.entry(place).mean.shape) == (16, (frames - 1) // 4 + 1, height // 8, width // 8)


def test_a_run_with_buckets_resumes_to_the_bit(bucketed: Bucketed) -> None:
    words = [
        "stage.steps=6",
        "stage.save_every=0",
        "stage.batch_size=2",
        "stage.gradient_accumulation=2",
        "stage.evaluate_every=3",
    ]
    server_says(bucketed.train("whole", *words), 0)
    done = bucketed.train("stopped", *words, fault="usr1@backward#7")
    assert done.fired and done.codes == [75], done.text[-3000:]
    server_says(bucketed.train("stopped", *words), 0, "after step 4")
    assert bucketed.losses("stopped") == bucketed.losses("whole") and bucketed.states("stopped", 6) == bucketed.states(
        "whole", 6
    )


def test_two_ranks_take_the_same_clips(bucketed: Bucketed) -> None:
    words = ["stage.steps=4", "stage.save_every=0", "stage.batch_size=2", "stage.learning_rate=1e-30"]
    server_says(bucketed.train("one", *words, "stage.gradient_accumulation=2", "deepspeed=zero2"), 0)
    assert bucketed.train("two", *words, "stage.gradient_accumulation=1", "deepspeed=zero2", ranks=2).codes == [0, 0]
    for step, (loss, _) in bucketed.losses("one").items():
        assert bucketed.losses("two")[step][0] == pytest.approx(loss, rel=1e-5)


def test_other_buckets_are_refused_before_training(bucketed: Bucketed) -> None:
    done = bucketed.train("other", "stage.steps=1", "data.buckets=[9x64x96]")
    assert done.code == 2 and "data.buckets=['9x64x96'], prepared with" in done.text, done.text[-2000:]
    bad = bucketed.train("bad", "stage.steps=1", "data.buckets=[9x64x96,9x60x96,8x64x96]")
    assert bad.code == 2 and "data.buckets" in bad.text and "9x60x96" in bad.text
