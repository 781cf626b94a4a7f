"""Test export and assemble under kills and full disks: the old folder stays, and a rerun gives equal files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from cogflow.files.hashing import hash_file
from cogflow.files.publish import check_manifest, files_below
from tests.faults.conftest import World, server_says
from tests.faults.server import Done

pytestmark = pytest.mark.slow

KILLS = {
    # stage: (point, whether the new one is in place)
    "export": (
        ("exporting#30", False),
        ("exported#2", False),
        ("manifest#1", False),
        ("renaming#1", False),
        ("renamed#1", True),
    ),
    "assemble": (("placing#2", False), ("manifest#1", False), ("renaming#1", False), ("renamed#1", True)),
}


@pytest.fixture(scope="module")
def trained(world: World) -> World:
    """Return a run with checkpoints of two steps, each exported."""
    server_says(world.train("source", "stage.steps=2", "stage.save_every=1"), 0)
    for step in (1, 2):
        server_says(run(world, "export", world.root / f"export-{step}", step), 0)
    return world


def run(world: World, stage: str, output: Path, step: int, **order: object) -> Done:
    """``stage`` of the checkpoint of ``step`` into ``output``, in several shards or copied."""
    words = ["debug=quick", f"run.root={world.root}", "run.name=source", f"stage={stage}", f"stage.output={output}"]
    if stage == "export":
        words += [f"stage.source={world.root}/source/checkpoints/step-{step:06d}", "stage.max_shard_size=2MB"]
    else:
        words += [f"stage.transformer={world.root}/export-{step}", "stage.link=copy", "stage.verify=false"]
    return world.server.run(*words, **order)


def hashes(folder: Path) -> dict[str, str]:
    return {name: hash_file(folder / name) for name in files_below(folder)}


@pytest.mark.parametrize("stage", KILLS)
def test_a_killed_export_keeps_the_old_folder_and_a_rerun_is_equal(trained: World, tmp_path: Path, stage: str) -> None:
    """Each kill happens on what the kill before left."""
    # All use the same path, because a pipeline's card contains the command that made it.
    target = tmp_path / "killed" / "out"
    server_says(run(trained, stage, target, 2), 0)
    new = hashes(target)
    shutil.rmtree(target)
    server_says(run(trained, stage, target, 1), 0)
    old = hashes(target)
    target.rename(tmp_path / "old")
    assert old.keys() == new.keys() and old != new
    assert stage == "assemble" or sum(name.endswith(".safetensors") for name in new) > 2
    for before, point, replaced in [(None, "renaming#1", False), *((old, *kill) for kill in KILLS[stage])]:
        shutil.rmtree(target, ignore_errors=True)
        if before:
            shutil.copytree(tmp_path / "old", target)
        done = run(trained, stage, target, 2, fault=f"kill@{point}")
        assert done.codes == [-9] and done.fired == [f"kill@{point}"], (point, done.text[-3000:])
        assert (hashes(target) if target.exists() else None) == (new if replaced else before), point
        assert replaced or any(path.name.startswith(".out.partial-") for path in target.parent.iterdir()), (
            "it had begun to write"
        )
    server_says(run(trained, stage, target, 2), 0)
    assert hashes(target) == new and check_manifest(target) == []
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("stage", KILLS)
def test_a_full_disk_in_an_export_keeps_the_old_folder(trained: World, tmp_path: Path, stage: str) -> None:
    target = tmp_path / "out"
    server_says(run(trained, stage, target, 1), 0)
    old = hashes(target)
    done = run(trained, stage, target, 2, largest_file=1_000_000)
    server_says(done, 2, "StorageError", str(target), "File too large", "GB free in")
    assert hashes(target) == old and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stage", KILLS)
def test_a_disk_without_room_names_path_needed_and_free(trained: World, tmp_path: Path, stage: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=8M none {disk} 2>/dev/null") != 0:
        pytest.skip("this machine lets nobody mount a small disk")
    try:
        # Both have a transformer of 5 MB; the old one leaves no room for another.
        shutil.copytree(trained.root / "export-1", disk / "out")
        old = hashes(disk / "out")
        done = run(trained, stage, disk / "out", 2)
        server_says(done, 2, "StorageError", f"{disk}/out needs 0.0", "GB are free in")
        assert hashes(disk / "out") == old and [path.name for path in disk.iterdir()] == ["out"]
    finally:
        os.system(f"umount {disk}")


def test_a_full_disk_under_the_metrics_log_keeps_whole_lines(world: World) -> None:
    """Every line of the log is whole after the disk was full, and training resumes from the last checkpoint."""
    words = ["stage.steps=40", "stage.save_every=0"]
    log = world.root / "log-full" / "metrics.jsonl"
    done = world.train("log-full", *words, largest_file=8000)
    server_says(done, 2, "StorageError", f"{log} cannot be written", "free")
    lines = log.read_bytes()
    assert 4000 < len(lines) <= 8000 and lines.endswith(b"\n")
    assert [json.loads(line)["step"] for line in lines.splitlines()][-1] < 40
    server_says(world.train("log-full", *words), 0)
    server_says(world.train("log-whole", *words), 0)
    assert world.losses("log-full") == world.losses("log-whole") and len(world.losses("log-full")) == 40
