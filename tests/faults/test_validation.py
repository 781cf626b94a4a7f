"""Test that a validation changes no loss, and that runs stopped, killed or resumed around it are equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.conftest import World, server_says

pytestmark = pytest.mark.slow

WORDS = ["stage.steps=4", "stage.save_every=0", "stage.ema_decay=0.9"]
WITH = ["stage.sample_every=2", "stage.evaluate_every=2", "sampling.steps=2"]


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompt") / "prompts.txt"
    path.write_text("a red circle moves to the right\n", encoding="utf-8")
    return f"sampling.prompts={path}"


@pytest.fixture(scope="module")
def undisturbed(world: World, prompt: str) -> str:
    server_says(world.train("validated", *WORDS, *WITH, prompt), 0)
    return "validated"


def videos(world: World, name: str) -> dict[str, bytes]:
    folder = world.root / name / "samples"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*.mp4")}


def test_validations_change_neither_losses_nor_weights(world: World, undisturbed: str) -> None:
    server_says(world.train("not-validated", *WORDS), 0)
    assert world.losses("not-validated") == world.losses(undisturbed) and len(world.losses(undisturbed)) == 4
    assert world.states("not-validated", 4) == world.states(undisturbed, 4)


@pytest.mark.parametrize(
    ("fault", "code", "resumed"),
    [
        ("term@denoising#3", 75, "after step 2"),  # in the validation after step 2, which is repeated
        ("usr1@evaluation#2", 75, "after step 2"),
        ("int@validated#2", 75, "after step 3"),
        ("kill@validated#2", -9, ""),
    ],
)
def test_a_run_stopped_around_a_validation_ends_like_an_uninterrupted_one(
    world: World, undisturbed: str, prompt: str, fault: str, code: int, resumed: str
) -> None:
    """The first validation is the one before step 1; each has two denoising steps."""
    name = fault.split("#")[0].replace("@", "-")
    done = world.train(name, *WORDS, *WITH, prompt, fault=fault)
    assert done.fired == [fault] and done.codes == [code], done.text[-3000:]
    again = server_says(world.train(name, *WORDS, *WITH, prompt), 0, resumed)
    assert not resumed or again.text.count("samples at step") == (2 if "2" in resumed else 1), again.text
    assert world.losses(name) == world.losses(undisturbed) and world.states(name, 4) == world.states(undisturbed, 4)
    found, expected = videos(world, name), videos(world, undisturbed)
    assert found == expected and len({path.split("/")[0] for path in found}) == 3, "samples of steps 0, 2 and 4"


def test_two_ranks_stop_a_validation_together(world: World, prompt: str) -> None:
    one_each = ["stage.gradient_accumulation=1", "deepspeed=zero3"]
    done = world.train("given-up", *WORDS, *WITH, *one_each, prompt, ranks=2, fault="term@denoising#2/1", seconds=90)
    assert done.fired == ["term@denoising#2/1"] and done.codes == [75, 75], done.text[-3000:]
    assert (
        "nothing is trained yet" in done.text and world.checkpoints("given-up") == [] and not videos(world, "given-up")
    )
    assert not [path for path in (world.root / "given-up/samples").iterdir() if path.name.startswith(".")]
