"""Test that the planned traffic of a step is that of real trainings: DeepSpeed on two gloo ranks, counted at
collectives and sockets."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import traffic
from benchmarks.traffic_rank import Collectives, sent_over_tcp
from cogflow.errors import CogflowError
from tests.faults.server import Server

CHECKED = [case for case in traffic.CASES if "ZeRO-2, bf16" not in case.name and "holds" not in case.name]


@pytest.fixture(scope="module")
def rows(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return the rows of two ranks, which the tests' server forks: test_the_benchmark_writes_its_rows uses torchrun."""
    folder = tmp_path_factory.mktemp("traffic")
    cases, results = folder / "cases.json", folder / "results.json"
    traffic.write_cases(cases, CHECKED)
    done = server.run(str(cases), str(results), ranks=2, seconds=300, program="benchmarks.traffic_rank")
    assert done.codes == [0, 0], done.text[-3000:]
    counted = json.loads(results.read_text(encoding="utf-8"))
    return {case.name: traffic.traffic_row(case, 2, found) for case, found in zip(CHECKED, counted, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in CHECKED])
def test_a_step_sends_the_planned_bytes(rows: dict[str, dict[str, Any]], name: str) -> None:
    row = rows[name]
    # Gradients differ by padding. ZeRO-3 gathers small weights once a step, and keeps whole layers or blocks.
    assert row["gradients, counted"] == pytest.approx(row["gradients, planned"], rel=0.001)
    assert row["weights, counted"] == pytest.approx(row["weights, planned"], rel=0.025 if "3" in name else 0.001)
    assert row["gradients, counted"] > 6 and (row["weights, counted"] > 3) == (name != "ZeRO-0")
    # The logged table, the gradient norm and the stop flags.
    assert 0 < row["other, counted"] < 0.002
    # Gloo's messages have headers, which TCP counts, too.
    assert row["TCP, of gloo's algorithms"] < row["TCP, measured"] < 1.01 * row["TCP, of gloo's algorithms"]


@pytest.mark.slow
def test_the_benchmark_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = traffic.compare_with_plan
    monkeypatch.setattr(traffic, "compare_with_plan", lambda advance: compare(traffic.CASES[:1], [1], advance))
    traffic.main(["--output", str(tmp_path / "traffic.json")])
    (row,) = json.loads((tmp_path / "traffic.json").read_text())["rows"]
    assert row["case"] == "ZeRO-0"
    assert row["gradients, planned"] == row["gradients, counted"] == row["TCP, measured"] == 0


@pytest.mark.slow
def test_the_output_of_a_failed_rank_is_reported() -> None:
    with pytest.raises(CogflowError, match=r"1 ranks ended with 1(?s:.)*stage.batch_siz"):
        traffic.count_traffic([traffic.TrafficCase("none", ("stage.batch_siz=1",))], 1)


def test_a_plan_for_one_rank_sends_nothing() -> None:
    for case in traffic.CASES:
        planned = traffic.predicted(case, 1)
        assert planned.between_gpus == 0
        assert traffic.predicted(case, 4).between_gpus == pytest.approx(1.5 * traffic.predicted(case, 2).between_gpus)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_collectives_are_counted_by_phase_and_kind() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        with Collectives() as counted:
            dist.all_reduce(torch.zeros(10))
            counted.counting = True
            dist.all_reduce(torch.zeros(10))
            counted.during("backward", lambda: dist.reduce_scatter_tensor(torch.zeros(8), torch.zeros(8)))()
            counted.during("step", lambda: dist.all_gather_into_tensor(torch.zeros(8), torch.zeros(8)))()
            counted.during("step", lambda: dist.all_reduce(torch.zeros(2)))()
    finally:
        dist.destroy_process_group()
    assert counted.bytes == {
        ("rest", "allreduce"): 40,
        ("backward", "reduce_scatter"): 32,
        ("step", "allgather"): 32,
        ("step", "allreduce"): 8,
    }


def test_the_bytes_sent_over_tcp_are_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        with far:
            before = sent_over_tcp()
            near.sendall(bytes(100_000))
            left = 100_000
            while left:
                left -= len(far.recv(left))
            assert sent_over_tcp() - before == 100_000


def test_the_summary_reports_the_largest_difference() -> None:
    row = {
        "ranks": 2,
        "gradients, planned": 10.0,
        "gradients, counted": 10.0,
        "weights, planned": 8.0,
        "weights, counted": 10.0,
    }
    row |= {"TCP, of gloo's algorithms": 20.0, "TCP, measured": 20.2}
    assert (
        "0.0% for gradients and 20.0% for weights over 1 trainings; bytes over TCP are within 1.0%"
        in traffic.format_summary([row, row | {"ranks": 1}])
    )
