"""What a plan says that a step sends beside what real trainings send: DeepSpeed on two gloo ranks, counted at collectives and sockets."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cogflow.benchmarking import traffic
from cogflow.benchmarking.traffic_rank import Collectives, sent_over_tcp
from cogflow.config.compose import compose
from cogflow.errors import CogflowError
from cogflow.stages import benchmark

CHECKED = [case for case in traffic.CASES if "ZeRO-2, bf16" not in case.name and "holds" not in case.name]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in traffic.compare(CHECKED, [2])}


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in CHECKED])
def test_a_step_sends_what_the_plan_says(rows: dict[str, dict[str, Any]], name: str) -> None:
    row = rows[name]
    # Gradients to the padding; of ZeRO-3's weights the small ones are gathered once a step, and what it holds is whole layers or blocks.
    assert row["gradients, counted"] == pytest.approx(row["gradients, planned"], rel=0.001)
    assert row["weights, counted"] == pytest.approx(row["weights, planned"], rel=0.025 if "3" in name else 0.001)
    assert row["gradients, counted"] > 6 and (row["weights, counted"] > 3) == (name != "ZeRO-0")
    # The log's table, the norm and who wants to stop.
    assert 0 < row["other, counted"] < 0.002
    # Headers of gloo's messages come on top.
    assert row["TCP, of gloo's algorithms"] < row["TCP, measured"] < 1.01 * row["TCP, of gloo's algorithms"]


@pytest.mark.slow
def test_the_benchmark_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "compare_traffic", lambda advance: traffic.compare(traffic.CASES[:1], [1], advance))
    words = ["stage=benchmark", "stage.what=traffic", f"run.root={tmp_path}", "run.name=b", "tracking.wandb=disabled"]
    benchmark.run(compose(words))
    (row,) = json.loads((tmp_path / "b" / "benchmark.json").read_text())["results"]["rows"]
    assert (
        row["case"] == "ZeRO-0" and row["gradients, planned"] == row["gradients, counted"] == row["TCP, measured"] == 0
    )


@pytest.mark.slow
def test_ranks_that_fail_are_told() -> None:
    with pytest.raises(CogflowError, match=r"1 ranks ended with 1(?s:.)*stage.batch_siz"):
        traffic.measure([traffic.Case("none", ("stage.batch_siz=1",))], 1)


def test_a_plan_for_one_rank_sends_nothing() -> None:
    for case in traffic.CASES:
        planned = traffic.predicted(case, 1)
        assert planned.between_gpus == 0
        assert traffic.predicted(case, 4).between_gpus == pytest.approx(1.5 * traffic.predicted(case, 2).between_gpus)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_collectives_are_counted_by_phase_and_kind() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
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
        ("rest", "allreduce"): 40, ("backward", "reduce_scatter"): 32, ("step", "allgather"): 32, ("step", "allreduce"): 8,
    }  # fmt: skip


def test_bytes_over_tcp_are_those_that_were_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        with far:
            before = sent_over_tcp()
            near.sendall(bytes(100_000))
            left = 100_000
            while left:
                left -= len(far.recv(left))
            assert sent_over_tcp() - before == 100_000


def test_the_summary_tells_the_largest_difference() -> None:
    row = {
        "ranks": 2,
        "gradients, planned": 10.0,
        "gradients, counted": 10.0,
        "weights, planned": 8.0,
        "weights, counted": 10.0,
    }
    row |= {"TCP, of gloo's algorithms": 20.0, "TCP, measured": 20.2}
    assert "0.0% for gradients and 20.0% for weights over 1 trainings; TCP carries within 1.0%" in traffic.told(
        [row, row | {"ranks": 1}]
    )
