"""Test the control of a GPU session: budget, time limits, failures and the output file. No GPU is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_session
from benchmarks.gpu_session import Measurement, list_measurements, metrics_goals, run_session
from cogflow.config.compose import compose


def command(folder: Path, name: str, body: str, **options: Any) -> Measurement:
    """Return a measurement that runs the Python code ``body``, with the path of its result file as sys.argv[1]."""
    result = folder / f"{name}.json"
    options = {"seconds": 30, "least": 0} | options
    return Measurement(name, [sys.executable, "-c", body, str(result)], result, **options)


WRITE = "import sys; open(sys.argv[1], 'w').write('{\"value\": 1}')"


def test_a_failure_does_not_stop_the_rest(tmp_path: Path) -> None:
    output = tmp_path / "out" / "session.json"
    measurements = [
        command(tmp_path, "fails", "print('oh'); raise SystemExit(3)"),
        command(tmp_path, "hangs", "import time; print('in', flush=True); time.sleep(60)", seconds=2),
        command(tmp_path, "silent", "pass"),
        command(tmp_path, "works", WRITE, goals=lambda results: {"one": results["value"] == 1}),
    ]
    outcomes = {outcome.name: outcome for outcome in run_session(measurements, 100, output)}
    statuses = {name: outcome.status for name, outcome in outcomes.items()}
    assert statuses == {"fails": "failed", "hangs": "timeout", "silent": "failed", "works": "done"}
    assert outcomes["fails"].problem == "oh" and outcomes["hangs"].problem == "in\n\nstopped after 2 s"
    assert "silent.json: FileNotFoundError" in outcomes["silent"].problem
    written = json.loads(output.read_text())["measurements"]
    assert [one["name"] for one in written] == ["fails", "hangs", "silent", "works"]
    assert written[-1]["results"] == {"value": 1} and written[-1]["goals"] == {"one": True}


def test_the_output_is_written_after_each_measurement(tmp_path: Path) -> None:
    output = tmp_path / "session.json"
    count = f"import json, sys; n = len(json.load(open({str(output)!r}))['measurements'])"
    second = command(tmp_path, "second", f"{count}; open(sys.argv[1], 'w').write(json.dumps({{'before': n}}))")
    outcomes = run_session([command(tmp_path, "first", WRITE), second], 100, output)
    assert outcomes[1].results == {"before": 1}


def test_the_budget_is_kept(tmp_path: Path) -> None:
    sleep = "import time; time.sleep(60)"
    measurements = [
        command(tmp_path, "slow", sleep),
        command(tmp_path, "long", WRITE, least=5),
        command(tmp_path, "needy", WRITE, needs="--cogvideo CLONE"),
    ]
    outcomes = run_session(measurements, 3, tmp_path / "session.json")
    assert [outcome.status for outcome in outcomes] == ["timeout", "skipped", "skipped"]
    assert outcomes[0].seconds < 10 and outcomes[1].problem.endswith("5 are needed")
    assert outcomes[2].problem == "needs --cogvideo CLONE"


def test_every_pending_measurement_is_in_the_session(tmp_path: Path) -> None:
    found = list_measurements(tmp_path, cpu=False, cogvideo=Path("clone"), python="python")
    names = [measurement.name for measurement in found]
    assert names[0] == "cogvideo_step" and names[-1] == "tiny_flow" and len(set(names)) == len(names) == 7
    zero3 = next(measurement for measurement in found if measurement.name == "step_zero3")
    assert "deepspeed=zero3" in zero3.command and "deepspeed=zero2" not in zero3.command


@pytest.mark.parametrize("cpu", [False, True])
def test_the_settings_of_every_stage_in_the_session_are_valid(tmp_path: Path, cpu: bool) -> None:
    start = [sys.executable, "-m", "cogflow"]
    commands = [one.command for one in list_measurements(tmp_path, cpu=cpu, cogvideo=None, python="python")]
    stages = [compose(command[3:]).stage.name for command in commands if command[:3] == start]
    assert stages == ["benchmark"] * 4 + ["flow"]


def test_goals_of_the_metrics_need_a_gpu() -> None:
    rows = [{"part": "all metrics", "seconds": 1.0}, {"part": "all metrics, batch of 4, per clip", "seconds": 0.01}]
    assert metrics_goals({"rows": rows, "disagreement": {}}) == {}
    assert list(metrics_goals({"rows": rows, "disagreement": {"blur": 1e-5}}).values()) == [True, True]
    assert list(metrics_goals({"rows": rows[:1], "disagreement": {"blur": 1e-3}}).values()) == [False, False]


@pytest.mark.slow
def test_a_session_on_a_cpu(tmp_path: Path) -> None:
    """One measurement by a stage and one by a benchmark; tests/stages run the command of "tiny_flow"."""
    output = tmp_path / "session.json"
    names = ["cogvideo_step", "step_zero3", "metrics"]
    gpu_session.main(["--cpu", "--folder", str(tmp_path / "runs"), "--output", str(output), "--only", *names])
    outcomes = {one["name"]: one for one in json.loads(output.read_text())["measurements"]}
    assert outcomes.pop("cogvideo_step")["status"] == "skipped"
    assert {name: one["problem"] for name, one in outcomes.items() if one["status"] != "done"} == {}
    assert outcomes["step_zero3"]["results"]["results"]["step"]["times"]["median"] > 0
    assert outcomes["metrics"]["results"]["rows"]
