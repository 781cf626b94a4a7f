"""Test that a step with a loss or gradient that is not finite changes no weight and no moment; and loss spikes."""

from __future__ import annotations

import json

import pytest

from tests.faults.conftest import World, server_says

pytestmark = pytest.mark.slow

STEP = ["stage.steps=4", "stage.save_every=1"]


@pytest.fixture(scope="module")
def sound(world: World) -> str:
    server_says(world.train("sound", *STEP), 0)
    return "sound"


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("what", ["nan@losses#6", "infgrad@backward#6"])
def test_a_step_that_is_not_finite_stops_the_run_and_changes_no_weight(world: World, zero: str, what: str) -> None:
    """The fault is in the second micro step of the third step."""
    name, whole = f"{what.split('@')[0]}-{zero}", f"sound-{zero}"
    if not (world.root / whole).exists():
        server_says(world.train(whole, *STEP, f"deepspeed={zero}"), 0)
    done = world.train(name, "stage.steps=4", "stage.save_every=0", f"deepspeed={zero}", fault=what)
    assert done.fired == [what]
    said = "The loss of step 3 is not finite (rank 0: " if "nan" in what else "The gradient of step 3 is not finite"
    server_says(done, 3, said, "on_not_finite=skip")
    assert world.checkpoints(name) == [2] and world.states(name, 2) == world.states(whole, 2)
    # Without the fault, the same command ends with the same result as an undisturbed run.
    server_says(world.train(name, *STEP, f"deepspeed={zero}"), 0, "after step 2")
    assert world.states(name, 4) == world.states(whole, 4) and world.losses(name) == world.losses(whole)


def test_a_skipped_update_has_no_effect_on_the_run(world: World, sound: str) -> None:
    done = world.train("skipped", *STEP, "stage.on_not_finite=skip", fault="nan@losses#6")
    server_says(done, 0, "an update was skipped")
    assert done.fired and world.states("skipped", 3) == world.states("skipped", 2) == world.states(sound, 2)
    assert world.states("skipped", 4) != world.states("skipped", 3)
    lines = [json.loads(line) for line in (world.root / "skipped/metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line["train/skipped"] for line in lines if "train/skipped" in line} == {
        1: 0,
        2: 0,
        3: 1,
        4: 1,
    }
    assert next(line for line in lines if line["step"] == 3)["train/loss"] is None


def test_a_rollback_resumes_the_checkpoint_with_a_lower_rate(world: World, sound: str) -> None:
    words = [*STEP, "stage.on_not_finite=rollback", "stage.rollback.learning_rate_ratio=0.5"]
    done = server_says(world.train("back", *words, fault="nan@losses#6"), 0, "rolling back to")
    assert done.fired
    rates = {
        line["step"]: line["train/lr"]
        for line in map(json.loads, (world.root / "back/metrics.jsonl").read_text().splitlines())
        if "train/lr" in line
    }
    undisturbed = {
        line["step"]: line["train/lr"]
        for line in map(json.loads, (world.root / "sound/metrics.jsonl").read_text().splitlines())
        if "train/lr" in line
    }
    assert rates[2] == undisturbed[2] and rates[3] == pytest.approx(0.5 * undisturbed[3])


def test_twenty_skipped_updates_in_a_row_end_the_run(world: World) -> None:
    faults = ",".join(f"nan@losses#{number}" for number in range(1, 60))
    done = world.train("never", "stage.steps=40", "stage.save_every=0", "stage.on_not_finite=skip", fault=faults)
    server_says(done, 3, "20th skipped update in a row")


def test_a_nan_on_one_rank_stops_both_ranks_before_the_update(world: World, sound: str) -> None:
    done = world.train(
        "one-of-two",
        "stage.steps=4",
        "stage.save_every=0",
        "stage.gradient_accumulation=1",
        ranks=2,
        fault="nan@losses#3/1",
    )
    assert done.fired == ["nan@losses#3/1"] and done.codes == [3, 3], done.text[-3000:]
    assert "The loss of step 3 is not finite (rank 1: " in done.text
    two = world.train("two", *STEP, "stage.gradient_accumulation=1", ranks=2)
    assert two.codes == [0, 0] and world.states("one-of-two", 2) == world.states("two", 2)


def test_a_spike_is_reported_and_skipped_on_request(world: World) -> None:
    words = ["stage.steps=40", "stage.save_every=0", "stage.gradient_accumulation=1", "stage.learning_rate=0"]
    reported = world.train("spike-reported", *words, fault="spike@losses#36")
    assert reported.fired and "a spike: step 36" in server_says(reported, 0).text
    skipped = world.train("spike-skipped", *words, "stage.on_spike=skip", fault="spike@losses#36")
    server_says(skipped, 0, "a spike: step 36", "the update was skipped")
    lines = [json.loads(line) for line in (world.root / "spike-skipped/metrics.jsonl").read_text().splitlines()]
    assert [line["train/skipped"] for line in lines if line.get("step") == 36 and "train/skipped" in line] == [1]
    # The optimizer does not count a skipped step.
    assert world.states("spike-skipped", 40)["steps"] == b"39" and world.states("spike-reported", 40)["steps"] == b"40"


def test_fp16_searches_its_loss_scale_and_logs_it(world: World) -> None:
    done = world.train(
        "half",
        "stage.steps=4",
        "model.dtype=fp16",
        "stage.save_every=0",
        "stage.gradient_accumulation=1",
        fault="fp16,infgrad@backward#2",
    )
    server_says(done, 0)
    scales = {
        line["step"]: (line["train/loss_scale"], line["train/skipped"])
        for line in map(json.loads, (world.root / "half/metrics.jsonl").read_text().splitlines())
        if "train/loss_scale" in line
    }
    assert done.fired and [scales[step][1] for step in (1, 2, 3, 4)] == [0, 1, 1, 1]
