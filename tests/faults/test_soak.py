"""Test that a run interrupted many times at random ends like an uninterrupted one.

Each process of the run ends by a kill, a signal or a full disk. ``COGFLOW_SOAK=100`` gives another number of
interruptions, ``COGFLOW_SOAK_SEED=2`` another random schedule; a failure names both. tests/faults/test_saves.py covers
every phase of a save one by one.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest

from cogflow.files.publish import check_manifest
from tests.faults.conftest import World, server_says

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

INTERRUPTIONS = int(os.environ.get("COGFLOW_SOAK", "30"))
SEED = int(os.environ.get("COGFLOW_SOAK_SEED", "1"))
STEPS = INTERRUPTIONS
"""Steps of the run. A process ends in its first or second save or step, so it advances by one step at most.

Training therefore does not end before the interruptions do.
"""
KILLED_AT = (
    "micro",
    "backward",
    "update",
    "updated",
    "states",
    "states-written",
    "weights",
    "weights-written",
    "hashed",
    "manifest",
    "manifest-written",
    "renaming",
    "renamed",
    "pointing",
    "deleting",
    "deleted",
)
ENDINGS = {"kill": 10, "signal": 4, "limit": 1, "full": 1}


Interruption = tuple[str, dict[str, int], int]


def schedule(seed: int) -> list[Interruption]:
    """Return (fault, options of the run, exit code) of each interruption. Every ending occurs."""
    drawn = random.Random(seed)
    endings = [*ENDINGS, *drawn.choices(list(ENDINGS), list(ENDINGS.values()), k=INTERRUPTIONS - len(ENDINGS))]
    drawn.shuffle(endings)
    return [interruption(ending, drawn) for ending in endings]


def interruption(ending: str, drawn: random.Random) -> Interruption:
    if ending == "kill":
        return f"kill@{drawn.choice(KILLED_AT)}#{drawn.choice((1, 2))}", {}, -9
    if ending == "signal":
        return f"{drawn.choice(('term', 'usr1', 'int'))}@{drawn.choice(('micro', 'backward', 'weights'))}#1", {}, 75
    if ending == "limit":
        return "", {"largest_file": 3_000_000}, 2
    return f"full@{drawn.choice(('states-written', 'manifest'))}#1", {}, 2


def test_a_run_interrupted_at_random_ends_like_an_uninterrupted_run(world: World) -> None:
    words = [f"stage.steps={STEPS}", "stage.save_every=1", "stage.keep_last=2", "stage.ema_decay=0.9"]
    server_says(world.train("undisturbed-soak", *words, seconds=600), 0)
    ended: Counter[str] = Counter()
    for number, (fault, options, code) in enumerate(schedule(SEED)):
        done = world.train("soaked", *words, fault=fault, **options)
        context = (
            f"interruption {number} of {INTERRUPTIONS}, seed {SEED}, {fault or options}: {done.codes} {done.fired}\n"
            f"{done.text[-3000:]}"
        )
        assert done.code == code and not done.timed_out and done.fired == ([fault] if fault else []), context
        visible = world.checkpoints("soaked")
        broken = [step for step in visible if check_manifest(world.root / "soaked/checkpoints" / f"step-{step:06d}")]
        assert not broken and (world.pointer("soaked") or 0) <= max(visible, default=0), context
        ended[fault.split("@")[0] or "limit"] += 1
    reached = max(world.checkpoints("soaked"))
    assert INTERRUPTIONS // 4 < reached < STEPS, f"{reached} of {STEPS} steps after {ended}"
    server_says(world.train("soaked", *words, seconds=600), 0)
    assert world.losses("soaked") == world.losses("undisturbed-soak")
    assert world.states("soaked", STEPS) == world.states("undisturbed-soak", STEPS)
    print(f"{INTERRUPTIONS} interruptions, {reached} of {STEPS} steps, ended by {dict(ended)}")
