"""Test stage=benchmark at toy size."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cogflow.artifacts.identify import identify
from cogflow.benchmarking import loader_cost
from cogflow.benchmarking.command_cost import run_command
from cogflow.benchmarking.random_sat_checkpoint import make_sat_checkpoint
from cogflow.benchmarking.results import BenchmarkResult
from cogflow.config.compose import compose
from cogflow.data.shapes import draw, scenes
from cogflow.data.video import write_video
from cogflow.errors import ConfigError, DataError
from cogflow.export.origin import open_origin
from cogflow.stages import benchmark
from tests.conftest import Command

ALLOCATE = "import time; x = bytearray(300_000_000); x[::4096] = bytes([1]) * len(x[::4096]); time.sleep(0.5)"


@pytest.fixture(autouse=True)
def restore_process_group() -> Iterator[None]:
    """Undo what a step in this process leaves behind: DeepSpeed's process group and the local rank."""
    before = os.environ.get("LOCAL_RANK")
    yield
    if before is None:
        os.environ.pop("LOCAL_RANK", None)
    if dist.is_initialized():
        dist.destroy_process_group()


def run_benchmark(root: Path, *words: str) -> dict[str, Any]:
    """Run stage=benchmark in this process and return the results of its record."""
    settings = ["stage=benchmark", f"run.root={root}", "run.name=b", "tracking=off"]
    model = [] if any(word.startswith("model=") for word in words) else ["model=tiny"]
    benchmark.run(compose([*settings, *model, *words]))
    return results_in(root)


def results_in(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "b" / "benchmark.json").read_text())["results"])


def step_words(root: Path, *more: str) -> list[str]:
    return ["stage=benchmark", f"run.root={root}", "run.name=b", "tracking=off", "stage.steps=1", *more]


def test_time_and_memory_are_those_of_the_process(tmp_path: Path) -> None:
    cost = run_command([sys.executable, "-c", ALLOCATE], tmp_path / "log")
    assert cost.ok and cost.seconds >= 0.5
    assert 300e6 < cost.anonymous < 400e6 and cost.resident >= cost.anonymous


def test_a_failing_command_is_reported(tmp_path: Path) -> None:
    cost = run_command([sys.executable, "-c", "print('oh'); raise SystemExit(9)"], tmp_path / "log")
    assert (cost.ok, cost.returncode, cost.tail) == (False, 9, "oh")
    assert cost.failure is not None and cost.failure.startswith("exit code 9 after")


def test_a_random_checkpoint_is_a_sat_checkpoint(tmp_path: Path) -> None:
    file = make_sat_checkpoint(tmp_path / "sat", "tiny", 2)
    origin = open_origin(identify(tmp_path / "sat"), ["transformer"])
    assert origin.kind == "sat" and file.is_file() and origin.tensors is not None
    assert len(origin.tensors.tensors) > 40


@pytest.mark.slow
def test_export_is_compared_with_cp(tmp_path: Path) -> None:
    results = run_benchmark(tmp_path, "stage.layers=1")
    assert set(results["medians"]) == {"cp + sync", "cogflow, verified", "cogflow, stage.verify=off"}
    assert all(values["seconds"] > 0 and values["peak_anonymous_gb"] >= 0 for values in results["medians"].values())
    assert not (tmp_path / "b" / "benchmark").exists()


@pytest.mark.slow
def test_assemble_is_compared_with_cp_and_save_pretrained(tmp_path: Path) -> None:
    results = run_benchmark(tmp_path, "stage.what=assemble", "stage.layers=1")
    assert [row["failed"] for row in results["rows"]] == [None] * 5
    assert {"cp -r + sync", "cogflow, linked", "cogflow, copied", "save_pretrained"} < set(results["medians"])
    assert results["bytes"] > 20e6 and not (tmp_path / "b" / "benchmark").exists()
    # An assembly holds only the libraries in anonymous memory; weights add nothing to it, whatever their size.
    assert results["medians"]["cogflow, linked"]["peak_anonymous_gb"] < 0.5


@pytest.mark.parametrize("wrong", ["stage.what=speed", "stage.contents=-1", "stage.repeats=0", "stage.steps=0"])
def test_settings_that_measure_nothing_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.split("=")[0]):
        compose(["stage=benchmark", wrong])


@pytest.mark.slow
def test_a_step_is_timed_and_profiled(tmp_path: Path, cogflow: Command) -> None:
    done = cogflow(*step_words(tmp_path, "stage.what=step", "stage.repeats=2", "stage.profile=true"))
    step = results_in(tmp_path)["step"]
    assert step["tokens"] == 104 and step["parameters"] == 3_053_312
    assert 0 < step["times"]["lowest"] <= step["times"]["median"] <= step["times"]["highest"]
    rate = step["flops"]["useful"] / step["times"]["median"]
    assert step["mfu"] == pytest.approx(rate / step["device_peak"]["flops"])
    assert step["flops"]["counted"] == pytest.approx(step["flops"]["useful"], rel=0.03)
    parts = {part["kind"]: part for part in step["profile"]}
    assert set(parts) == {"attention", "linear layers", "optimizer", "compiled", "copies", "other", "idle"}
    for kind in ("attention", "linear layers", "optimizer", "other"):
        assert parts[kind]["seconds"] > 0 and parts[kind]["launches"]
    assert "linear layers: " in done.stdout and parts["linear layers"]["floor"] > parts["attention"]["floor"] > 0
    assert 0 < step["memory"]["weights"] < step["memory"]["resident"] < step["memory"]["peak"]


@pytest.mark.slow
def test_settings_of_a_step_are_compared(tmp_path: Path, cogflow: Command) -> None:
    settings = "stage.settings=['','speed.attention=math deepspeed=zero1','speed.attention=cudnn']"
    cogflow(*step_words(tmp_path, "stage.what=train", settings))
    rows = results_in(tmp_path)["rows"]
    names = ["as configured", "speed.attention=math deepspeed=zero1", "speed.attention=cudnn"]
    assert [row["settings"] for row in rows] == names
    assert [row["step"] is None for row in rows] == [False, False, True]
    assert "needs a GPU" in rows[2]["problem"]


@pytest.mark.slow
def test_a_save_is_compared_with_torch_save_and_cp(tmp_path: Path, cogflow: Command) -> None:
    cogflow(*step_words(tmp_path, "stage.what=checkpoint", "stage.repeats=2"))
    found = results_in(tmp_path)
    assert len(found["rows"]) == 8 and set(found["parts"]) == {"states", "weights", "hashes", "publishing", "verifying"}
    # Twelve bytes a parameter of masters and moments, and the weights twice: DeepSpeed's file holds them, too.
    assert all(row["gb"] == pytest.approx(3_053_312 * 20 / 1e9, rel=0.05) for row in found["rows"])
    assert not (tmp_path / "b" / "benchmark").exists()


@pytest.mark.slow
def test_a_validation_is_timed_by_part_beside_training(tmp_path: Path, cogflow: Command) -> None:
    cogflow(*step_words(tmp_path, "stage.what=validate", "stage.repeats=2", "sampling.steps=2"))
    found = results_in(tmp_path)
    assert len(found["samples"]) == 2 and set(found["seconds"]) == {"denoising", "decoding", "metrics", "writing"}
    assert found["share"] == pytest.approx(8 * sum(found["seconds"].values()) / (500 * found["training_step"]))


def test_drawn_clips_are_read_part_by_part(tmp_path: Path) -> None:
    found = run_benchmark(tmp_path, "stage.what=prepare", "stage.repeats=2", "stage.contents=2", "stage.clip_height=80")
    assert len(found["seconds"]) == 2 and len(found["clips"]) == 2
    assert "from 2 of 142x80 (h264, 24 a second)" in found["summary"]
    parts = ["hashing the file", "opening, reading packets", "decoding", "colours", "resizing, cropping"]
    assert list(found["parts"])[:5] == parts and all(seconds > 0 for seconds in found["parts"].values())
    assert not (tmp_path / "b" / "benchmark" / "prepare").exists()


def test_clips_that_cannot_be_measured_are_reported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no clips"):
        run_benchmark(tmp_path, "stage.what=prepare", f"stage.clips={tmp_path / 'empty'}")
    write_video(tmp_path / "clips" / "short.mp4", draw(scenes(1, seed=3)[0], 6, 96, 144), 24, threads=1)
    with pytest.raises(DataError, match="a clip cannot be read: too short"):
        run_benchmark(tmp_path, "stage.what=prepare", f"stage.clips={tmp_path / 'clips'}")


@pytest.mark.slow
def test_batches_of_a_cache_are_timed_beside_a_step(tmp_path: Path) -> None:
    found = run_benchmark(tmp_path, "stage.what=loader", "stage.repeats=2", "stage.steps=1", "stage.batch_size=2")
    latents = 16 * 3 * 8 * 12
    assert found["bytes"] > 2 * 4 * (2 * latents)  # latents and noise of two clips, and their text
    low, high = sorted(found["seconds"]["a batch"])
    assert low <= found["share"] * found["step"] <= high
    assert "a training step of" in found["summary"] and not (tmp_path / "b" / "benchmark" / "loader").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the step is measured")
def test_a_step_that_does_not_fit_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_cost, "CACHED_CLIPS", 2)
    monkeypatch.setattr(loader_cost, "BATCHES", 1)
    size = ["data.frames=9", "data.height=480", "data.width=720"]
    found = run_benchmark(tmp_path, "stage.what=loader", "model=cogvideox-5b", *size)
    assert "forecast for a GPU" in found["step_source"] and 0 < found["share"] < 1


def test_all_continues_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise DataError("no clips", "Give some.")

    result = BenchmarkResult("loader: fast", ["part"], [["a batch"]], {"seconds": 1.0})
    monkeypatch.setattr(benchmark, "ALL", ("prepare", "loader"))
    monkeypatch.setitem(benchmark.BENCHMARKS, "prepare", fail)
    monkeypatch.setitem(benchmark.BENCHMARKS, "loader", lambda *_: result)
    found = run_benchmark(tmp_path, "stage.what=all")
    assert found["prepare"] == {"summary": "prepare: not measured: no clips\n  Give some."}
    assert found["loader"] == {"summary": "loader: fast", "seconds": 1.0}
    assert found["summary"].count("\n") == 2
