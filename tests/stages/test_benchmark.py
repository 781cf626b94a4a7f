"""The benchmark measures what it says, at toy size."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cogflow.artifacts.identify import identify
from cogflow.benchmarking.measure import measure
from cogflow.benchmarking.panel_cost import WHOLE, cost
from cogflow.benchmarking.sat_checkpoint import make_checkpoint
from cogflow.config.compose import compose
from cogflow.data.shapes import draw, scenes
from cogflow.data.video import write_video
from cogflow.errors import ConfigError, DataError
from cogflow.export.origin import open_origin
from cogflow.stages import load
from tests.conftest import Command

HOLD = "import time; x = bytearray(300_000_000); x[::4096] = bytes([1]) * len(x[::4096]); time.sleep(0.5)"


def test_memory_and_time_are_those_of_the_process(tmp_path: Path) -> None:
    result = measure([sys.executable, "-c", HOLD], tmp_path / "log")
    assert (
        result.ok and result.seconds >= 0.5 and 300e6 < result.anonymous < 400e6 and result.resident >= result.anonymous
    )


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    result = measure([sys.executable, "-c", "print('oh'); raise SystemExit(9)"], tmp_path / "log")
    assert (result.ok, result.returncode, result.tail) == (False, 9, "oh")


def test_a_made_checkpoint_is_one_that_sat_would_have_written(tmp_path: Path) -> None:
    file = make_checkpoint(tmp_path / "sat", "tiny", 2)
    origin = open_origin(identify(tmp_path / "sat"), ["transformer"])
    assert origin.kind == "sat" and file.is_file() and origin.tensors is not None
    assert len(origin.tensors.tensors) > 40


@pytest.mark.slow
def test_export_beside_cp(tmp_path: Path) -> None:
    config = compose(
        [
            "stage=benchmark",
            "model=tiny",
            "stage.layers=1",
            f"run.root={tmp_path}",
            "run.name=b",
            "tracking.wandb=disabled",
        ]
    )
    load("benchmark").run(config)
    results = json.loads((tmp_path / "b" / "benchmark.json").read_text())["results"]
    assert set(results["medians"]) == {"cp + sync", "cogflow, verified", "cogflow, stage.verify=off"}
    assert all(figures["seconds"] > 0 and figures["peak_anonymous_gb"] >= 0 for figures in results["medians"].values())
    assert not (tmp_path / "b" / "benchmark").exists()


@pytest.mark.slow
def test_assemble_beside_cp_and_save_pretrained(tmp_path: Path) -> None:
    words = [
        "stage=benchmark",
        "stage.what=assemble",
        "model=tiny",
        "stage.layers=1",
        f"run.root={tmp_path}",
        "run.name=b",
    ]
    load("benchmark").run(compose([*words, "tracking.wandb=disabled"]))
    results = json.loads((tmp_path / "b" / "benchmark.json").read_text())["results"]
    assert [row["failed"] for row in results["rows"]] == [None] * 5
    assert {"cp -r + sync", "cogflow, linked", "cogflow, copied", "save_pretrained"} < set(results["medians"])
    assert results["bytes"] > 20e6 and not (tmp_path / "b" / "benchmark").exists()
    # What an assembly holds for itself is the libraries: weights add nothing to it, whatever their size.
    assert results["medians"]["cogflow, linked"]["peak_anonymous_gb"] < 0.5


def test_a_clone_that_is_none(tmp_path: Path) -> None:
    config = compose(
        ["stage=benchmark", "model=tiny", f"stage.vs={tmp_path}", f"run.root={tmp_path}", "tracking.wandb=disabled"]
    )
    with pytest.raises(ConfigError, match="convert_weight_sat2hf"):
        load("benchmark").run(config)


def test_separation_of_clips_in_a_folder(tmp_path: Path) -> None:
    for number, scene in enumerate(scenes(2, seed=3)):
        write_video(tmp_path / "clips" / f"{number}.mp4", draw(scene, 9, 96, 144), 8)
    common = [
        "stage=benchmark",
        "model=tiny",
        f"run.root={tmp_path}",
        "run.name=b",
        "tracking.wandb=disabled",
        "data.frames=5",
    ]
    load("benchmark").run(
        compose([*common, "stage.what=separation", f"stage.clips={tmp_path / 'clips'}", "stage.variants=2"])
    )
    results = json.loads((tmp_path / "b" / "benchmark.json").read_text())["results"]
    assert (results["contents"], results["pairs"]) == (2, 4)
    assert (
        results["auc"]["gauss 1.5"]["blur"] == 1
        and results["kinds"]["gauss 1.5"]["soft"] == 1
        and results["monotone"] == 1
    )
    assert results["nulls"]["contrast"]["rounding"] < results["nulls"]["contrast"]["variants"]
    with pytest.raises(DataError, match="does not exist"):
        load("benchmark").run(compose([*common, "stage.what=separation", f"stage.clips={tmp_path / 'nowhere'}"]))


@pytest.mark.slow
def test_the_watch_on_clips_in_a_folder(tmp_path: Path) -> None:
    for number, scene in enumerate(scenes(4, seed=3)):
        write_video(tmp_path / "clips" / f"{number}.mp4", draw(scene, 9, 96, 144), 8)
    common = [
        "stage=benchmark",
        "model=tiny",
        f"run.root={tmp_path}",
        "run.name=b",
        "tracking.wandb=disabled",
        "data.frames=5",
    ]
    load("benchmark").run(
        compose(
            [*common, "stage.what=watch", f"stage.clips={tmp_path / 'clips'}", "stage.variants=2", "stage.share=0.01"]
        )
    )
    results = json.loads((tmp_path / "b" / "benchmark.json").read_text())["results"]
    still, ceiling = results["rows"][0], results["rows"][-1]
    assert (still["drift"], still["false alarms"], still["gauss 1, third"]) == (0.0, 0, still["damaged"])
    assert ceiling["clips"] == 256 and set(results["nulls"]["drifts"]) >= {"blur", "clipped"}


def test_the_indicators_cost_is_told(tmp_path: Path) -> None:
    common = [
        "stage=benchmark",
        "model=tiny",
        f"run.root={tmp_path}",
        "run.name=b",
        "tracking.wandb=disabled",
        "stage.what=indicator",
    ]
    load("benchmark").run(compose(common))
    tiny, real = json.loads((tmp_path / "b" / "benchmark.json").read_text())["results"]["rows"]
    assert 0 < tiny["indicator"] < tiny["step"] and real["step"] is None


def test_the_panels_cost_is_told_part_by_part() -> None:
    found = cost(9, 64, 96, repeats=1)
    parts = {row["part"]: row for row in found["rows"] if row["device"].startswith("cpu")}
    assert WHOLE in parts and "edge_sharpness, reblur" in parts
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in found["rows"])
    assert all(difference < 1e-4 for difference in found["disagreement"].values())


@pytest.mark.parametrize("wrong", ["stage.what=speed", "stage.variants=1", "stage.contents=-1", "stage.share=0"])
def test_settings_that_measure_nothing(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.split("=")[0]):
        compose(["stage=benchmark", wrong])


def step_words(root: Path, *more: str) -> list[str]:
    return ["stage=benchmark", f"run.root={root}", "run.name=b", "tracking=off", "stage.steps=1", *more]


def results(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "b" / "benchmark.json").read_text())["results"])


@pytest.mark.slow
def test_a_step_is_timed_beside_a_bare_loop_and_its_ceiling(tmp_path: Path, cogflow: Command) -> None:
    done = cogflow(*step_words(tmp_path, "stage.what=step", "stage.vs=bare", "stage.repeats=2", "stage.profile=true"))
    step = results(tmp_path)["step"]
    assert step["tokens"] == 104 and step["parameters"] == 3_053_312 and "beside a bare loop" in done.stdout
    assert 0 < step["seconds"]["lowest"] <= step["seconds"]["median"] <= step["seconds"]["highest"]
    assert step["mfu"] == pytest.approx(step["flops"]["useful"] / step["seconds"]["median"] / step["ceiling"]["flops"])
    assert step["flops"]["counted"] == pytest.approx(step["flops"]["useful"], rel=0.03)
    parts = {part["kind"]: part for part in step["profile"]}
    assert set(parts) == {"attention", "linear layers", "optimizer", "compiled", "copies", "other", "nothing runs"}
    assert all(
        parts[kind]["seconds"] > 0 and parts[kind]["launches"]
        for kind in ("attention", "linear layers", "optimizer", "other")
    )
    assert "linear layers: " in done.stdout and parts["linear layers"]["floor"] > parts["attention"]["floor"] > 0
    assert (
        step["bare"]["median"] > 0
        and 0 < step["memory"]["weights"] < step["memory"]["resident"] < step["memory"]["peak"]
    )


@pytest.mark.slow
def test_settings_of_a_step_beside_each_other_and_beside_a_revision(
    tmp_path: Path, cogflow: Command, repository: Path
) -> None:
    revision = ["stage.vs=HEAD"] if (repository / ".git").exists() else []
    settings = "stage.settings=['','speed.attention=math deepspeed=zero1','speed.attention=cudnn']"
    cogflow(*step_words(tmp_path, "stage.what=train", settings, *revision))
    rows = results(tmp_path)["rows"]
    assert [row["settings"] for row in rows] == [
        "as it is",
        "speed.attention=math deepspeed=zero1",
        "speed.attention=cudnn",
    ] + ["cogflow at HEAD" for _ in revision]
    assert [row["step"] is None for row in rows] == [False, False, True, *(False for _ in revision)]
    assert "needs a GPU" in rows[2]["problem"]


def test_a_revision_that_is_none_is_told_before_anything_runs(tmp_path: Path, cogflow: Command) -> None:
    done = cogflow(*step_words(tmp_path, "stage.what=train", "stage.vs=no-such-revision"), code=2)
    assert "no-such-revision: neither bare, nor a clone of zai-org/CogVideo, nor a revision" in done.stderr


@pytest.mark.slow
def test_a_save_beside_torch_save_and_cp(tmp_path: Path, cogflow: Command) -> None:
    cogflow(*step_words(tmp_path, "stage.what=checkpoint", "stage.repeats=2"))
    found = results(tmp_path)
    assert len(found["rows"]) == 8 and set(found["parts"]) == {"states", "weights", "hashes", "publishing", "verifying"}
    # Twelve bytes a parameter of masters and moments, and the weights twice: DeepSpeed's file holds them, too.
    assert all(row["gb"] == pytest.approx(3_053_312 * 20 / 1e9, rel=0.05) for row in found["rows"])
    assert not (tmp_path / "b" / "benchmark").exists()


@pytest.mark.slow
def test_a_validation_by_part_beside_training(tmp_path: Path, cogflow: Command) -> None:
    cogflow(*step_words(tmp_path, "stage.what=validate", "stage.repeats=2", "sampling.steps=2"))
    found = results(tmp_path)
    assert len(found["samples"]) == 2 and set(found["seconds"]) == {"denoising", "decoding", "panel", "writing"}
    assert found["share"] == pytest.approx(8 * sum(found["seconds"].values()) / (500 * found["training step"]))


@pytest.mark.slow
def test_all_goes_on_where_one_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cogflow.errors import DataError
    from cogflow.stages import benchmark

    def broken(*_: Any) -> Any:
        raise DataError("no clips", "Give some.")

    monkeypatch.setattr(benchmark, "ALL", ("panel", "indicator"))
    monkeypatch.setitem(benchmark.WHAT, "panel", broken)
    config = compose(
        ["stage=benchmark", "stage.what=all", "model=tiny", f"run.root={tmp_path}", "run.name=b", "tracking=off"]
    )
    benchmark.run(config)
    found = results(tmp_path)
    assert found["panel"] == {"summary": "panel: not measured: no clips\n  Give some."} and found["indicator"]["rows"]
    assert found["summary"].count("\n") == 2
