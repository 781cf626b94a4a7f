"""Test that one training at a time writes into a run folder, with real processes of the command line."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from cogflow.files.record_io import read_record
from cogflow.records.run_records import LockRecord
from tests.faults.conftest import World, server_says
from tests.faults.server import Running

pytestmark = pytest.mark.slow

STEPS = ["stage.steps=6", "stage.save_every=2"]


def logged(run: Path) -> Counter[int]:
    """Return how often each training step is in metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return Counter(line["step"] for line in lines if "train/loss" in line)


def start_and_stop(world: World, name: str, *more: str) -> Running:
    """Start a training, and stop its process (SIGSTOP) when it has logged two steps."""
    running = world.server.start(*world.words(name, *STEPS), *more, fault="hasty")
    deadline = time.monotonic() + 60
    while len(logged(world.root / name)) < 2:
        assert time.monotonic() < deadline, "the training logs two steps"
        time.sleep(0.02)
    os.kill(running.pids[0], signal.SIGSTOP)
    assert len(logged(world.root / name)) < 6, "it is stopped before its end"
    return running


def newest_lock(run: Path) -> Path:
    return max((run / "lock").glob("*.json"))


def test_a_second_writer_is_refused_and_the_first_is_unharmed(world: World) -> None:
    run = world.root / "twice"
    running = start_and_stop(world, "twice")
    for stage in ("train", "prepare", "flow"):
        words = [word for word in world.words("twice", stage=stage) if stage == "train" or "stage." not in word]
        refused = world.server.run(*words, fault="hasty")
        server_says(refused, 2, "is in use", f"process {running.pids[0]} on", "run.name=NEW")
        assert refused.err.count("RunInUse") == 1 and "Traceback" not in refused.text
    os.kill(running.pids[0], signal.SIGCONT)
    server_says(world.server.wait(running), 0)
    assert logged(run) == dict.fromkeys(range(1, 7), 1)
    assert read_record(newest_lock(run), LockRecord).released
    server_says(world.train("alone", *STEPS), 0)
    assert world.losses("twice") == world.losses("alone") and world.states("twice", 6) == world.states("alone", 6)


def test_a_killed_training_is_resumed_at_once(world: World) -> None:
    running = start_and_stop(world, "killed")
    os.kill(running.pids[0], signal.SIGKILL)
    # Nobody has collected the killed process yet. The second training has the usual times: it does not wait for them.
    done = server_says(world.train("killed", *STEPS), 0)
    assert "waiting up to" not in done.out
    assert world.server.wait(running).codes == [-signal.SIGKILL]
    assert logged(world.root / "killed") == dict.fromkeys(range(1, 7), 1)


def test_a_stopped_training_releases_its_folder(world: World) -> None:
    server_says(world.train("stopped", *STEPS, fault="term@backward#5"), 75)
    assert read_record(newest_lock(world.root / "stopped"), LockRecord).released


def test_a_training_whose_lock_was_taken_over_ends_and_writes_no_more(world: World) -> None:
    run = world.root / "stolen"
    running = start_and_stop(world, "stolen")
    # A write that was in progress when the process was stopped may end, in a hidden folder that nothing reads.
    visible = [path for path in run.rglob("*") if path.is_file() and ".partial-" not in str(path)]
    before = {path: path.stat().st_mtime_ns for path in visible if path.parent.name != "lock"}
    path = newest_lock(run)
    values = json.loads(path.read_text()) | {"host": "another", "pid": 1, "job": "4711"}
    (run / "lock" / "000009.json").write_text(json.dumps(values))
    time.sleep(0.7)  # longer than the training waits between two renewals
    os.kill(running.pids[0], signal.SIGCONT)
    done = world.server.wait(running)
    server_says(done, 2, "its lock was taken over by process 1 on another, SLURM job 4711")
    after = {path: path.stat().st_mtime_ns for path in before if path.exists() and path.parent.name != "ranks"}
    assert after == {path: before[path] for path in after}
    assert json.loads((run / "lock" / "000009.json").read_text()) == values


def test_a_folder_of_another_machine_is_taken_over_when_nobody_renews_its_lock(world: World) -> None:
    run = world.root / "moved"
    server_says(world.train("moved", *STEPS, fault="kill@backward#5"), -signal.SIGKILL)
    path = newest_lock(run)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "another"}))
    done = world.train("moved", *STEPS, fault="hasty")
    server_says(done, 0, "waiting up to 2 s to see whether", "was not renewed in 2 s", "after step 2")
    assert logged(run) == dict.fromkeys(range(1, 7), 1)
