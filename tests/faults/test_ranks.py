"""Test that when one of two ranks dies or hangs, the other ends in time and names it, and no checkpoint is lost."""

from __future__ import annotations

import pytest

from tests.faults.conftest import World, server_says

pytestmark = pytest.mark.slow

WORDS = ["stage.steps=4", "stage.save_every=2", "stage.gradient_accumulation=1"]


@pytest.fixture(scope="module")
def undisturbed(world: World) -> str:
    done = world.train("two-undisturbed", *WORDS, "stage.evaluate_every=1", ranks=2)
    assert done.codes == [0, 0], done.text[-3000:]
    return "two-undisturbed"


@pytest.mark.parametrize("point", ["backward#4", "states-written#2", "hashed#2", "evaluation#4"])
def test_a_killed_rank_is_named_and_the_pointer_stays(world: World, undisturbed: str, point: str) -> None:
    name = f"killed-{point.split('#')[0]}"
    more = [*WORDS, "stage.evaluate_every=1"]
    done = world.train(name, *more, ranks=2, fault=f"kill@{point}/1", seconds=90)
    assert done.fired == [f"kill@{point}/1"] and done.codes[1] == -9 and not done.timed_out, done.text[-3000:]
    assert done.codes[0] == 1 and "rank 1 (" in done.text and "is gone; its last phase: " in done.text, done.text[
        -3000:
    ]
    assert world.pointer(name) == 2
    again = world.train(name, *more, ranks=2)
    # Rank 0 needs no other rank after hashing: the checkpoint is whole, as its manifest proves.
    said = "this run is finished" if point == "hashed#2" else "after step 2"
    assert again.codes == [0, 0] and said in again.text and world.pointer(name) == 4, again.text[-3000:]
    assert world.losses(name) == world.losses(undisturbed) and world.states(name, 4) == world.states(undisturbed, 4)


def test_a_rank_that_hangs_is_named_and_both_ranks_end(world: World) -> None:
    done = world.train("hung", *WORDS, "stage.stall_minutes=0.1", ranks=2, fault="hang@micro#3/1", seconds=90)
    assert done.fired == ["hang@micro#3/1"] and not done.timed_out and done.codes == [1, 1], (
        done.codes,
        done.text[-3000:],
    )
    assert "rank 1 (" in done.text and "phase: step 3: waiting for data" in done.text
    stacks = list((world.root / "hung/ranks").glob("rank-*.stack"))
    assert any("injected.py" in path.read_text() for path in stacks), "the stack shows where it hangs"


def test_a_full_disk_on_one_rank_ends_both_and_keeps_the_old_checkpoint(world: World) -> None:
    done = world.train("full-one", *WORDS, ranks=2, fault="full@states-written#2/1", seconds=90)
    assert done.fired and not done.timed_out and done.codes[1] == 2 and done.codes[0] != 0, done.text[-3000:]
    assert (
        "rank 1: StorageError" in done.text and world.pointer("full-one") == 2 and world.checkpoints("full-one") == [2]
    )


def test_killed_ranks_of_prepare_lose_no_published_shard(world: World) -> None:
    words = ["stage=prepare", "debug=quick", f"run.root={world.root}", "tracking.wandb=disabled", "stage.shard_clips=2"]
    done = world.server.run(*words, "run.name=prepare-killed", ranks=2, fault="kill@encoding#4/1", seconds=90)
    assert done.fired and done.codes[1] == -9 and done.codes[0] != 0 and not done.timed_out, done.text[-3000:]
    assert not (world.root / "prepare-killed/cache/index.json").exists()
    again = world.server.run(*words, "run.name=prepare-killed", ranks=2)
    server_says(again, 0, "reused")
    whole = world.server.run(*words, "run.name=prepare-whole")
    server_says(whole, 0)
    index = [(world.root / name / "cache/index.json") for name in ("prepare-killed", "prepare-whole")]
    import json

    one, two = (json.loads(path.read_text()) for path in index)
    assert one["fingerprint"] == two["fingerprint"] and len(one["entries"]) == 12
