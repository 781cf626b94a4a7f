"""Test resuming with other settings: some may change with a warning, all others are refused with both values."""

from __future__ import annotations

import shutil

import pytest

from tests.faults.conftest import World, server_says

pytestmark = pytest.mark.slow

WORDS = ["stage.save_every=0", "stage.ema_decay=0.9", "stage.seed=3"]


@pytest.fixture(scope="module")
def half(world: World) -> str:
    server_says(world.train("unchanged", *WORDS, "stage.steps=2"), 0)
    return "unchanged"


def resumed(world: World, half: str, name: str, *more: str, stage: str = "stage.steps=3") -> tuple[int, str]:
    shutil.copytree(world.root / half, world.root / name)
    kept = [word for word in WORDS if word.split("=")[0] not in {one.split("=")[0] for one in more}]
    done = world.train(name, *kept, stage, *more)
    return done.code, done.text


def test_settings_that_may_change_are_reported(world: World, half: str) -> None:
    code, text = resumed(
        world, half, "tuned", "stage.learning_rate=3e-5", "stage.evaluate_every=1", "stage.text_dropout=0.2"
    )
    assert code == 0, text[-3000:]
    for line in (
        "stage.steps changes from 2 to 3",
        "stage.learning_rate changes from 0.0004 to 3e-05",
        "stage.text_dropout changes from 0.1 to 0.2",
    ):
        assert line in text, text[-3000:]
    assert "stage.evaluate_every changes" not in text and world.checkpoints("tuned") == [2, 3]


def test_settings_that_may_not_change_are_all_refused_at_once(world: World, half: str) -> None:
    more = ["stage.seed=4", "stage.freeze=[patch_embed.*]", "stage.gradient_accumulation=3", "stage.ema_decay=0"]
    code, text = resumed(world, half, "refused", *more)
    assert code == 2 and "Traceback" not in text, text[-3000:]
    for line in (
        "stage.seed: 3 then, 4 now",
        "stage.freeze: [] then, ['patch_embed.*'] now",
        "stage.gradient_accumulation: 2 then, 3 now",
        "clips in a step (batch_size x gradient_accumulation x world size): 2 then, 3 now",
        "stage.ema_decay: 0.9 then, 0.0 now",
        "stage.resume=never",
    ):
        assert line in text, text[-3000:]
    assert world.checkpoints("refused") == [2] and world.pointer("refused") == 2


def test_frozen_weights_keep_their_bits_under_another_zero_stage(world: World) -> None:
    words = ["stage.freeze=[transformer_blocks.0.*,patch_embed.*]", "stage.save_every=0", "stage.learning_rate=1e-3"]
    server_says(world.train("frozen", *words, "stage.steps=2", "deepspeed=zero2"), 0)
    server_says(world.train("frozen", *words, "stage.steps=3", "deepspeed=zero3"), 0, "after step 2", "resharded")
    server_says(world.train("frozen", *words, "stage.steps=4", "deepspeed=zero0"), 0, "after step 3", "resharded")
    from tests.faults.test_starting import weights

    before, after = (
        weights(world.model / "transformer"),
        weights(world.root / "frozen/checkpoints/step-000004/transformer"),
    )
    for name, value in before.items():
        assert value.equal(after[name]) == name.startswith(("transformer_blocks.0.", "patch_embed.")), name
