"""Test that a run interrupted a hundred times at random ends like an uninterrupted one.

Each life of the run ends by a kill, a signal or a full disk.
``COGFLOW_SOAK`` gives another number of lives, ``COGFLOW_SOAK_SEED`` another schedule; a failure names both.
"""

from __future__ import annotations

import os
import random

import pytest

from cogflow.files.publish import check_manifest
from tests.faults.conftest import World, server_says

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

LIVES = int(os.environ.get("COGFLOW_SOAK", "100"))
SEED = int(os.environ.get("COGFLOW_SOAK_SEED", "1"))
STEPS = LIVES
"""Steps of the run. A life ends in its first or second save or step, so it advances by one step at most.

Training therefore does not end before the lives do.
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


Life = tuple[str, dict[str, int], tuple[int, ...]]


def schedule(seed: int) -> list[Life]:
    """Return (fault, order, allowed exit codes) of each life."""
    drawn = random.Random(seed)
    lives: list[Life] = []
    for _ in range(LIVES):
        kind = drawn.choices(list(ENDINGS), list(ENDINGS.values()))[0]
        if kind == "kill":
            lives.append((f"kill@{drawn.choice(KILLED_AT)}#{drawn.choice((1, 2))}", {}, (-9,)))
        elif kind == "signal":
            lives.append(
                (
                    f"{drawn.choice(('term', 'usr1', 'int'))}@{drawn.choice(('micro', 'backward', 'weights'))}#1",
                    {},
                    (75,),
                )
            )
        elif kind == "limit":
            lives.append(("", {"largest_file": 3_000_000}, (2,)))
        else:
            lives.append((f"full@{drawn.choice(('states-written', 'manifest'))}#1", {}, (2,)))
    return lives


def test_a_hundred_interrupted_runs_end_like_one_uninterrupted_run(world: World) -> None:
    words = [f"stage.steps={STEPS}", "stage.save_every=1", "stage.keep_last=2", "stage.ema_decay=0.9"]
    server_says(world.train("undisturbed-soak", *words, seconds=600), 0)
    ended: dict[str, int] = {}
    for life, (fault, order, codes) in enumerate(schedule(SEED)):
        done = world.train("soaked", *words, fault=fault, **order)
        context = (
            f"life {life} of {LIVES}, seed {SEED}, {fault or order}: {done.codes} {done.fired}\n{done.text[-3000:]}"
        )
        assert done.code in codes and not done.timed_out and done.fired == ([fault] if fault else []), context
        visible = world.checkpoints("soaked")
        broken = [step for step in visible if check_manifest(world.root / "soaked/checkpoints" / f"step-{step:06d}")]
        assert not broken and (world.pointer("soaked") or 0) <= max(visible, default=0), context
        ended[fault.split("@")[0] or "limit"] = ended.get(fault.split("@")[0] or "limit", 0) + 1
    reached = max(world.checkpoints("soaked"))
    assert LIVES // 4 < reached < STEPS, f"{reached} of {STEPS} steps after {ended}"
    server_says(world.train("soaked", *words, seconds=600), 0)
    assert world.losses("soaked") == world.losses("undisturbed-soak")
    assert world.states("soaked", STEPS) == world.states("undisturbed-soak", STEPS)
    print(f"{LIVES} lives, {reached} of {STEPS} steps, ended by {ended}")
