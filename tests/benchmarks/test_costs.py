"""Test the benchmarks of the metrics, the indicator, the overhead, the export and the step, at toy size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import export, indicator_cost, step
from benchmarks.metrics_cost import ALL_METRICS, measure_metrics_cost, metrics_result
from benchmarks.peers import cogvideo_step
from cogflow.errors import ConfigError
from tests.faults.server import Server


def test_the_indicator_costs_less_than_a_step(tmp_path: Path) -> None:
    output = tmp_path / "indicator.json"
    indicator_cost.main(["--repeats", "3", "--output", str(output)])
    tiny, real = json.loads(output.read_text())["rows"]
    assert 0 < tiny["indicator"] < tiny["step"] and real["step"] is None


def test_the_metrics_are_measured_part_by_part() -> None:
    found = measure_metrics_cost(9, 64, 96, repeats=1)
    parts = {row.part for row in found.rows if row.device.startswith("cpu")}
    assert {ALL_METRICS, "edge_sharpness, reblur"} <= parts
    assert all(row.seconds > 0 and row.peak_gb > 0 for row in found.rows)
    assert all(difference < 1e-4 for difference in found.disagreement.values())
    assert "one clip of 9x64x96 in" in metrics_result(found, (9, 64, 96)).summary


@pytest.mark.slow
def test_a_step_is_compared_with_a_bare_loop(tmp_path: Path, server: Server) -> None:
    output = tmp_path / "overhead.json"
    words = ["--configured", "--output", str(output), f"run.root={tmp_path}", "tracking=off", "stage.steps=1"]
    done = server.run(*words, program="benchmarks.overhead", seconds=300)
    assert done.codes == [0], done.text[-3000:]
    found = json.loads(output.read_text())["step"]
    assert found["other"]["median"] > 0 and "beside a bare loop" in done.out
    assert found["ratio_to_other"] == pytest.approx(found["times"]["median"] / found["other"]["median"])


@pytest.mark.slow
def test_a_step_is_compared_with_a_revision(tmp_path: Path, repository: Path) -> None:
    if not (repository / ".git").exists():
        pytest.skip("no git repository")
    output = tmp_path / "step.json"
    places = ["--folder", str(tmp_path / "runs"), "--output", str(output)]
    step.main(["--vs", "HEAD", *places, "stage.steps=1", "stage.repeats=1"])
    rows = json.loads(output.read_text())["rows"]
    assert [row["settings"] for row in rows] == ["as configured", "cogflow at HEAD"]
    assert all(row["step"]["times"]["median"] > 0 for row in rows), rows


def test_an_unknown_revision_is_reported_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-revision is neither a clone of zai-org/CogVideo nor a revision"):
        step.main(["--vs", "no-such-revision", "--folder", str(tmp_path)])


def test_an_export_needs_a_clone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="convert_weight_sat2hf"):
        export.main(["--vs", str(tmp_path)])


def test_no_file_beside_the_scripts_of_peers_shadows_the_standard_library() -> None:
    """A script's folder is first on its path, and Python imports some of its own modules before the script can change
    that."""
    names = {path.stem for path in Path(cogvideo_step.__file__).parent.glob("*.py")}
    assert not names & sys.stdlib_module_names
