"""Test signals as schedulers and users send them: one, several, to one rank, during a save, twice."""

from __future__ import annotations

import signal

import pytest

from tests.faults.conftest import World, server_says

pytestmark = pytest.mark.slow

STEPS = ["stage.steps=4", "stage.save_every=2"]


@pytest.mark.parametrize("name", ["term", "usr1", "int"])
def test_each_signal_saves_and_the_same_command_resumes(world: World, name: str) -> None:
    done = world.train(f"stopped-{name}", *STEPS, fault=f"{name}@backward#5")
    assert done.fired and server_says(done, 75, "Stopped after step 3", "Run the same command").seconds < 60
    assert world.checkpoints(f"stopped-{name}") == [2, 3]
    server_says(world.train(f"stopped-{name}", *STEPS), 0, "after step 3")
    if not (world.root / "unsignalled").exists():
        server_says(world.train("unsignalled", *STEPS), 0)
    assert world.losses(f"stopped-{name}") == world.losses("unsignalled")
    assert world.states(f"stopped-{name}", 4) == world.states("unsignalled", 4)


def test_a_signal_to_one_rank_stops_both_at_the_same_step(world: World) -> None:
    done = world.train("one-rank", *STEPS, "stage.gradient_accumulation=1", ranks=2, fault="term@update#3/1")
    assert done.fired == ["term@update#3/1"] and done.codes == [75, 75], done.text[-3000:]
    assert world.checkpoints("one-rank") == [2, 3]


def test_a_signal_during_a_save_lets_it_finish(world: World) -> None:
    done = world.train("in-a-save", *STEPS, fault="usr1@weights#1")
    assert done.fired and server_says(done, 75).code == 75
    assert world.checkpoints("in-a-save") == [2, 3]


def test_a_second_signal_ends_at_once_and_damages_nothing(world: World) -> None:
    done = world.train("twice", *STEPS, fault="twice@weights-written#2")
    assert done.fired and done.codes == [128 + signal.SIGTERM] and "ending at once" in done.text, done.text[-3000:]
    assert world.checkpoints("twice") == [2] and world.pointer("twice") == 2
    server_says(world.train("twice", *STEPS), 0, "after step 2")
    assert world.checkpoints("twice") == [2, 4]
