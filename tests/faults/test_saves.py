"""Test kill -9 in every phase of a save, full disks and changed files: whole checkpoints stay and are resumed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cogflow.artifacts.run_layout import step_folders
from cogflow.files.publish import check_manifest
from cogflow.training import checkpoint
from tests.faults.conftest import World, server_says

pytestmark = pytest.mark.slow

BEFORE = (
    "states",
    "states-written",
    "weights",
    "weights-written",
    "hashed",
    "manifest",
    "manifest-written",
    "renaming",
)
"""Phases of a save in which nothing new may be visible."""
AFTER = ("renamed", "pointing", "deleting", "deleted")
"""Phases in which the new checkpoint is whole; ``latest.json`` moves in the second."""
PHASES = (*BEFORE, *AFTER)
STEPS = len(PHASES) + 2


def test_a_kill_in_every_phase_of_a_save_loses_no_checkpoint(world: World) -> None:
    common = [f"stage.steps={STEPS}", "stage.save_every=1", "stage.keep_last=2"]
    server_says(world.train("unkilled", *common), 0)
    last = 0
    for phase in PHASES:
        # In the second save of the process where nothing new may be visible, else in the first.
        fault = f"kill@{phase}#{2 if phase in BEFORE else 1}"
        done = world.train("killed", *common, fault=fault)
        assert done.codes == [-9] and done.fired == [fault], (phase, done.text[-3000:])
        assert not last or f"after step {last}" in done.text, (phase, done.text[-3000:])
        visible = world.checkpoints("killed")
        assert all(check_manifest(world.root / "killed/checkpoints" / f"step-{step:06d}") == [] for step in visible), (
            phase
        )
        assert max(visible) == last + 1, phase
        last += 1
        # The pointer moves only after the checkpoint that it names was read back.
        assert world.pointer("killed") == (last - 1 if phase in ("renamed", "pointing") else last), phase
    done = server_says(world.train("killed", *common), 0)
    assert f"after step {last}" in done.text
    assert world.losses("killed") == world.losses("unkilled") and world.pointer("killed") == STEPS
    assert world.states("killed", STEPS) == world.states("unkilled", STEPS)
    # No incomplete or superfluous file is left.
    names = sorted(path.name for path in (world.root / "killed/checkpoints").iterdir())
    assert names == ["latest.json", f"step-{STEPS - 1:06d}", f"step-{STEPS:06d}"]


def test_a_full_disk_in_a_save_keeps_the_old_checkpoint(world: World) -> None:
    """A limit acts like a full disk in the middle of a file; the transformer has 5 MB, its optimizer states 15 MB."""
    common = ["stage.steps=4", "stage.save_every=2"]
    server_says(world.train("limited", *common, "stage.steps=2"), 0)
    done = world.train("limited", *common, largest_file=3_000_000)
    server_says(done, 2, "StorageError", str(world.root / "limited/checkpoints/step-000004"), "free")
    assert world.checkpoints("limited") == [2] and world.pointer("limited") == 2
    assert [path.name for path in (world.root / "limited/checkpoints").iterdir() if path.name.startswith(".")] == []
    server_says(world.train("limited", *common), 0, "after step 2")
    server_says(world.train("unlimited", *common), 0)
    assert world.states("limited", 4) == world.states("unlimited", 4)


def test_a_save_without_room_is_refused_before_it_writes(world: World, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=60M none {disk} 2>/dev/null") != 0:
        pytest.skip("this machine lets nobody mount a small disk")
    try:
        shutil.copytree(world.root / "prepared" / "cache", disk / "small" / "cache")
        words = [
            word for word in world.words("unused", "stage.steps=3", "stage.save_every=1") if not word.startswith("run.")
        ]
        done = world.server.run(*words, f"run.root={disk}", "run.name=small")
        server_says(done, 2, "StorageError", str(disk / "small/checkpoints/step-000003"), "needs 0.03 GB", "are free")
        kept = sorted(path.name for path in (disk / "small/checkpoints").iterdir())
        assert kept == ["latest.json", "step-000001", "step-000002"]
        assert all(check_manifest(disk / "small/checkpoints" / name) == [] for name in kept[1:])
    finally:
        os.system(f"umount {disk}")


def edit(folder: Path, name: str) -> Path:
    return next(folder.glob(name))


CHANGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda folder: os.truncate(edit(folder, "deepspeed/state/*optim_states.pt"), 1000),
    "one bit": lambda folder: flip(edit(folder, "transformer/*.safetensors")),
    "missing": lambda folder: edit(folder, "deepspeed/state/*model_states.pt").unlink(),
    "extra": lambda folder: (folder / "deepspeed/state/zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"x"),
    "swapped": lambda folder: shutil.copyfile(
        edit(folder.parent / "step-000001", "transformer/*.safetensors"), edit(folder, "transformer/*.safetensors")
    ),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
}


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_a_changed_checkpoint_is_skipped_before_it_is_loaded(world: World, tmp_path: Path) -> None:
    server_says(world.train("changed", "stage.steps=3", "stage.save_every=1"), 0)
    for name, change in CHANGES.items():
        folder = tmp_path / name
        shutil.copytree(world.root / "changed/checkpoints", folder)
        change(folder / "step-000003")
        found, passed = checkpoint.newest_whole(step_folders(folder))
        assert found == folder / "step-000002" and len(passed) == 1 and "step-000003" in passed[0], name


def test_a_pickle_that_would_run_code_is_not_resumed(world: World, tmp_path: Path) -> None:
    import torch

    from cogflow.files.publish import write_manifest

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'canary'}",)

    server_says(world.train("poisoned", "stage.steps=2", "stage.save_every=1"), 0)
    folder = world.root / "poisoned/checkpoints/step-000002"
    states = edit(folder, "deepspeed/state/*optim_states.pt")
    torch.save({"optimizer_state_dict": {"nested": [Payload()]}}, states)
    # A checkpoint of another run has a correct manifest, too.
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    server_says(world.train("poisoned", "stage.steps=3"), 2, "CheckpointError", states.name)
    assert not (tmp_path / "canary").exists()
    torch.load(states, weights_only=False)
    assert (tmp_path / "canary").exists(), "the payload would not have done anything"


def test_weights_without_states_are_exported_and_not_resumed(world: World) -> None:
    server_says(world.train("alone", "stage.steps=4", "stage.weights_every=2", "stage.ema_decay=0.9"), 0)
    folder = world.root / "alone/weights/step-000002"
    assert (
        check_manifest(folder) == [] and not (folder / "deepspeed").exists() and (folder / "ema/config.json").is_file()
    )
    assert json.loads((folder / "trainer.json").read_text())["step"] == 2
    server_says(
        world.train("alone", "stage.steps=5", f"stage.resume={folder}"),
        2,
        "without optimizer states",
        f"stage.start={folder}",
    )
    server_says(
        world.server.run(
            "stage=export",
            f"run.root={world.root}",
            "run.name=alone",
            "tracking.wandb=disabled",
            f"stage.source={folder}",
        ),
        0,
    )
    assert (world.root / "alone/export/transformer/config.json").is_file()
