"""Test sequence parallelism: gradients and metrics equal one rank's to fp32 rounding; bad settings are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cogflow.config.compose import compose
from cogflow.errors import CheckpointError, ConfigError
from cogflow.records.training_records import RankLayout
from cogflow.training import sequence
from cogflow.training.run_identity import check_same, clips_per_step, run_identity, training_layout, tunable_settings
from tests import small
from tests.conftest import Command
from tests.faults.server import Server
from tests.training.sequences import CASES
from tests.training.trainer_records import trainer_record


@pytest.fixture(scope="module")
def found(prepared: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of two ranks and, under ``alone``, those of one rank's training on the same clips."""
    root = tmp_path_factory.mktemp("sequence")
    shutil.copytree(prepared, root / "prepared")
    small.pipeline(root / "model")
    for ranks, program, words in (
        (2, "tests.training.sequences", []),
        (1, "tests.training.resuming", ["resume:zero2:alone"]),
    ):
        done = server.run(str(root), *words, ranks=ranks, seconds=900, program=program)
        assert done.codes == [0] * ranks, done.text[-6000:]
    alone = json.loads((root / "resume-zero2-alone-1.json").read_text())["changed"]
    return json.loads((root / "sequences.json").read_text()) | {"alone": alone}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_sequence_parallel_gradients_equal_those_of_one_rank(found: dict[str, Any], name: str) -> None:
    """The mean of the ranks' gradients, which DeepSpeed takes, equals one rank's; in bf16 to bf16's rounding."""
    half = name == "bf16"
    for rank, by_case in enumerate(found["passes"]):
        one = by_case[name]
        assert one["out"] < (1e-2 if half else 1e-6) and one["loss"] < (1e-2 if half else 1e-6), (rank, one)
        assert one["gradients"] < (1e-2 if half else 1e-6) and one["worst gradient"] < (0.1 if half else 1e-5), (
            rank,
            one,
        )
        assert one["same loss"] and one["names"] and one["missing"] == []
        assert one["by itself"], "without being asked the model should run on this rank alone, to the bit"
        case = CASES[name]
        grid = case.get("frames", 3) // (2 if case["kind"].startswith("1.5") else 1) * 9
        total = (case["text"] + grid) * len(found["passes"])
        assert all(abs(tokens - total / 4) <= 1 for tokens in one["tokens"]), "each rank should have half of the tokens"
        recomputed = case.get("every", 0) == 1
        assert len(one["tokens"]) == (2 if recomputed else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_sequence_parallel_training_agrees_with_one_rank(found: dict[str, Any], name: str) -> None:
    """Losses by quarter of the timesteps, gradient norms, held-out losses, the averages' and the indicator's: every
    step, every number.
    """
    alone, shared = found["alone"]["numbers"], found[name]["whole"]["numbers"]
    assert alone.keys() == shared.keys() and len(alone) >= 6
    for step, values in alone.items():
        assert values.keys() == shared[step].keys()
        for key, value in values.items():
            if key.startswith(("train/loss", "train/grad_norm", "heldout/", "ema/")):
                assert shared[step][key] == pytest.approx(value, rel=1e-5), (step, key)
            elif key.startswith("spectrum/"):  # of differences between nearly equal numbers
                assert shared[step][key] == pytest.approx(value, rel=1e-2, abs=1e-3), (step, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_stopped_and_resumed_run_is_equal_to_the_bit(found: dict[str, Any], name: str) -> None:
    one = found[name]
    assert one["codes"] == [75, 0] and one["fired"] == 1
    assert one["whole"] == one["stopped"] and len(one["whole"]["files"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_validation_samples_whole_prompts_on_each_rank(found: dict[str, Any], name: str) -> None:
    """Two ranks sample three prompts, so one of them has no prompt of its own in the second round."""
    assert [len(samples) for samples in found[name]["samples"]] == [3, 3]


@pytest.mark.slow
def test_resuming_without_sequence_parallelism_agrees_to_rounding(found: dict[str, Any]) -> None:
    for step, values in found["alone"]["numbers"].items():
        for key in ("train/loss", "train/grad_norm", "heldout/loss"):
            if key in values:
                assert found["apart later"]["numbers"][step][key] == pytest.approx(values[key], rel=1e-5), (step, key)


@pytest.mark.slow
def test_a_gradient_not_finite_on_one_rank_stops_all_ranks(found: dict[str, Any]) -> None:
    assert found["lost"]["exchanges"] == [16, 16]
    for said in found["lost"]["said"]:
        assert "The gradient of step 2 is not finite" in said and "the weights are those before the step" in said


def words(*more: str) -> list[str]:
    return ["stage=train", "debug=quick", *more]


@pytest.mark.parametrize(
    ("size", "world", "parts"),
    [
        (0, "4", ["parallel.sequence=0", "1 or more"]),
        (3, "4", ["parallel.sequence=3", "the 4 ranks", "one of 1, 2, 4"]),
        (8, "4", ["parallel.sequence=8", "the 4 ranks"]),
    ],
)
def test_a_sequence_size_that_does_not_divide_the_ranks_is_refused(
    monkeypatch: pytest.MonkeyPatch, size: int, world: str, parts: list[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError) as caught:
        compose(words(f"parallel.sequence={size}", "stage.batch_size=0"))
    for part in (*parts, "2 problems", "stage.batch_size=0"):
        assert part in str(caught.value)


@pytest.mark.parametrize("more", [["speed.compile=blocks"], ["stage=benchmark", "stage.what=train"]])
def test_settings_incompatible_with_sequence_parallelism_are_refused(more: list[str]) -> None:
    stage = [] if more[0].startswith("stage=") else ["stage=train"]
    assert compose([*stage, *more])
    with pytest.raises(ConfigError, match=r"parallel\.sequence=2"):
        compose([*stage, *more, "parallel.sequence=2"])


def test_settings_are_composed_without_ranks() -> None:
    assert compose(words("parallel.sequence=8")).parallel.sequence == 8


def test_problems_of_heads_and_ranks_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(words("parallel.sequence=4"))
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ConfigError) as caught:
        sequence.check(config)
    for part in ("2 problems", "the 6 ranks in all: one of 1, 2, 3, 6", "the 6 attention heads of model=tiny"):
        assert part in str(caught.value)
    monkeypatch.setenv("WORLD_SIZE", "4")
    sequence.check(compose(words("parallel.sequence=2")))


def test_bad_sequence_settings_end_with_exit_code_2_and_one_message(cogflow: Command, tmp_path: Path) -> None:
    """One process without a rank. The heads and the ranks are checked before the model is built."""
    done = cogflow(*words("parallel.sequence=4", f"run.root={tmp_path}", "tracking.wandb=disabled"), code=None)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("ConfigError") == 1 and "parallel.sequence=4" in done.stderr


def test_the_flow_checks_sequence_settings_before_it_prepares(cogflow: Command, tmp_path: Path) -> None:
    done = cogflow(
        "stage=flow", "debug=quick", "parallel.sequence=4", f"run.root={tmp_path}", "tracking.wandb=disabled", code=None
    )
    assert done.returncode == 2 and not (tmp_path / "debug-quick" / "cache").exists()
    assert "the 1 rank in all" in done.stderr and "the 6 attention heads of model=tiny" in done.stderr


def test_the_parts_of_a_sequence_differ_by_one_token() -> None:
    assert sequence.split_counts(226, 4) == (57, 57, 56, 56)
    assert sequence.split_counts(1, 2) == (1, 0)
    assert sequence.split_counts(48, 2) == (24, 24)


def test_the_clips_of_a_step_are_those_of_the_data_ranks() -> None:
    layout = RankLayout(batch_size=2, gradient_accumulation=3, world_size=8, zero_stage=2, offload_optimizer=False)
    assert clips_per_step(layout) == 48
    assert clips_per_step(replace(layout, sequence_parallel=4)) == 12


def test_a_resumed_run_must_take_as_many_clips_a_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resume a checkpoint of ranks with a batch each by ranks that share their batches."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    cache: Any = SimpleNamespace(fingerprint="of the clips")
    before = compose(words())
    record = trainer_record(
        1,
        layout=training_layout(before),
        settings=tunable_settings(before.stage),
        identity=run_identity(before, cache),
    )
    check_same(record, before, cache)
    assert "resharded" not in capsys.readouterr().out
    with pytest.raises(CheckpointError) as caught:
        check_same(record, compose(words("parallel.sequence=2")), cache)
    for part in ("parallel.sequence: 1 then, 2 now", "divided by parallel.sequence): 8 then, 4 now"):
        assert part in str(caught.value)
    check_same(record, compose(words("parallel.sequence=2", "stage.batch_size=4")), cache)
    assert "parallel.sequence 1 -> 2" in capsys.readouterr().out
