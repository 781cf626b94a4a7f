"""Compare the planned traffic of a step with that of real trainings of the tiny model over gloo: ``python -m
benchmarks.traffic``.

Training on CPUs uses the same DeepSpeed, with the same collectives over the same tensors. Only the communication
library differs. The operations and their sizes therefore hold for GPUs, but gloo's algorithms differ from NCCL's: gloo
implements a reduce-scatter as an all-reduce of which each rank keeps its part, which sends twice as much as NCCL's
ring. Bytes over TCP are compared with gloo's algorithms.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.output import new_parser, report
from cogflow.benchmarking.results import BenchmarkResult
from cogflow.config.compose import compose
from cogflow.errors import CogflowError
from cogflow.planning import step_time
from cogflow.runtime.progress import progress
from cogflow.training import gpu_layout, transformer_size

RANKS = (1, 2, 4)

REPOSITORY = Path(__file__).resolve().parents[1]

RING = {"allreduce": 2.0, "allgather": 1.0, "reduce_scatter": 1.0, "broadcast": 1.0, "reduce": 1.0}
"""Bytes that an operation over M bytes sends from each of N ranks of a ring, in units of M (N - 1) / N.

An all-reduce is a reduce-scatter followed by an all-gather.
"""

GLOO = RING | {"reduce_scatter": 2.0}
"""The same factors for the algorithms of torch's gloo."""

LAUNCHER = re.compile(r"^.*torch/distributed/elastic/.*$", re.MULTILINE)
"""Pattern of the log lines of torchrun itself."""

COMMON = (
    "stage=train",
    "model=tiny",
    "stage.batch_size=1",
    "stage.gradient_accumulation=2",
    "stage.sample_every=0",
    "stage.evaluate_every=0",
    "stage.save_every=0",
    "tracking.wandb=disabled",
)
"""Settings of every training. Two micro steps show the traffic of each micro step."""


@dataclass(frozen=True)
class TrafficCase:
    """A training whose traffic is counted.

    ``reuse``: elements within which ZeRO-3 keeps gathered weights; ``None``: DeepSpeed's default.
    """

    name: str
    words: tuple[str, ...]
    reuse: int | None = None

    @property
    def all_words(self) -> list[str]:
        return [*COMMON, *self.words]


CASES = (
    *(TrafficCase(f"ZeRO-{stage}", (f"deepspeed=zero{stage}",)) for stage in range(4)),
    TrafficCase("ZeRO-2, bf16", ("deepspeed=zero2", "model.dtype=bf16")),
    TrafficCase("ZeRO-3, bf16, averages", ("deepspeed=zero3", "model.dtype=bf16", "stage.ema_decay=0.9")),
    TrafficCase("ZeRO-3, holds 1.6e6 elements", ("deepspeed=zero3", "deepspeed.allgather_bucket_size=400_000"), 0),
    TrafficCase(
        "ZeRO-3, recomputed, reuse within 4e6",
        ("deepspeed=zero3", "deepspeed.activation_checkpointing=true"),
        4_000_000,
    ),
)
"""Cases to compare. The tiny model has 3.1e6 weights, which ZeRO-3 by default gathers once and keeps. The last two
cases let it keep fewer weights."""


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command line ``words`` (default: ``sys.argv``)."""
    parser = new_parser("traffic", __doc__)
    given = parser.parse_args(words)
    with progress(len(RANKS), "numbers of ranks") as bar:
        rows = compare_with_plan(advance=bar.advance)
    cells = [list(row.values()) for row in rows]
    report(BenchmarkResult(format_summary(rows), list(rows[0]), cells, {"rows": rows}), given.output)


def compare_with_plan(
    cases: Sequence[TrafficCase] = CASES, worlds: Sequence[int] = RANKS, advance: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """Start the ranks, and return one row per case and number of ranks: the planned and the counted traffic of one step
    from rank 0.

    Raises :class:`CogflowError` with the last lines of output when the ranks fail.
    """
    rows = []
    for world in worlds:
        found = count_traffic(cases, world)
        rows += [traffic_row(case, world, one) for case, one in zip(cases, found, strict=True)]
        if advance:
            advance(1)
    return rows


def count_traffic(cases: Sequence[TrafficCase], world: int) -> list[dict[str, Any]]:
    """Return the counts of :mod:`benchmarks.traffic_rank` for each case on ``world`` processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        asked, results = Path(folder) / "cases.json", Path(folder) / "results.json"
        write_cases(asked, cases)
        torchrun = [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
            "-m",
            "benchmarks.traffic_rank",
        ]
        # Without GPUs the backend is gloo, whose traffic the kernel counts.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", *torchrun, str(asked), str(results)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, cwd=REPOSITORY)
        if done.returncode or not results.is_file():
            # torchrun's lines about its ranks follow the ranks' own output and are longer.
            own = LAUNCHER.split(done.stderr, maxsplit=1)[0] or done.stderr
            raise CogflowError(f"The trainings on {world} ranks ended with {done.returncode}:\n{own[-2000:]}")
        found: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))
        return found


def write_cases(file: Path, cases: Sequence[TrafficCase]) -> None:
    """Write the cases for :mod:`benchmarks.traffic_rank`."""
    file.write_text(json.dumps([{"words": case.all_words, "reuse": case.reuse} for case in cases]), encoding="utf-8")


def traffic_row(case: TrafficCase, world: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return megabytes (10^6) that one rank sends in one step. "other": traffic that is neither gradients nor weights,
    such as the logged losses."""
    planned = predicted(case, world)
    around = (world - 1) / world
    counted = {"gradients": 0.0, "weights": 0.0, "other": 0.0}
    wire = 0.0
    for name, operands in found["operands"].items():
        phase, kind = name.split()
        counted[_carried(phase, kind)] += RING.get(kind, 0.0) * operands * around
        wire += GLOO.get(kind, 0.0) * operands * around
    return {
        "case": case.name,
        "ranks": world,
        "gradients, planned": planned.gradients / 1e6,
        "gradients, counted": counted["gradients"] / 1e6,
        "weights, planned": (planned.weights + planned.averages) / 1e6,
        "weights, counted": counted["weights"] / 1e6,
        "other, counted": counted["other"] / 1e6,
        "TCP, of gloo's algorithms": wire / 1e6,
        "TCP, measured": sum(found["wires"]) / len(found["wires"]) / 1e6,
    }


def _carried(phase: str, kind: str) -> str:
    if kind == "allgather":
        return "weights"
    return "gradients" if phase == "backward" else "other"


def predicted(case: TrafficCase, world: int) -> step_time.Traffic:
    """Return the planned traffic of ``case``."""
    config = compose(case.all_words)
    own, _ = transformer_size.of_model(config.model)
    dtype = "fp32" if config.model.dtype == "auto" else config.model.dtype
    layout = gpu_layout.of_config(config, dtype, world)
    tokens = transformer_size.tokens(own, config.data.frames, config.data.height, config.data.width)
    return step_time.traffic(own, tokens, layout if case.reuse is None else replace(layout, reuse=case.reuse))


def format_summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence about the largest differences between plan and trainings."""
    several = [row for row in rows if row["ranks"] > 1]
    apart = {
        what: max((_apart(row[f"{what}, planned"], row[f"{what}, counted"]) for row in several), default=0.0)
        for what in ("gradients", "weights")
    }
    wire = max((_apart(row["TCP, of gloo's algorithms"], row["TCP, measured"]) for row in several), default=0.0)
    return (
        f"traffic: the plan is off by at most {apart['gradients']:.1%} for gradients and "
        f"{apart['weights']:.1%} for weights over "
        f"{len(several)} trainings; bytes over TCP are within {wire:.1%} of those of gloo's algorithms"
    )


def _apart(planned: float, counted: float) -> float:
    return abs(planned - counted) / max(planned, counted) if planned or counted else 0.0


if __name__ == "__main__":
    main()
