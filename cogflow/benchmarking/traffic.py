"""What the planner says that a step sends, beside what real trainings of the tiny model send on this machine, over gloo.

Training on CPUs goes through the same DeepSpeed, with the same collectives over the same tensors; only the library below differs. So the
operations and their sizes hold for GPUs as they are. What gloo makes of them does not: it reduces and scatters by an all-reduce of which
each rank keeps its part, which sends twice what NCCL's ring does. Bytes over TCP are held against that.
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

from cogflow.config.compose import compose
from cogflow.errors import CogflowError
from cogflow.planning import gpu_layout, traffic, transformer_size

RANKS = (1, 2, 4)

RING = {"allreduce": 2.0, "allgather": 1.0, "reduce_scatter": 1.0, "broadcast": 1.0, "reduce": 1.0}
"""Times its M bytes (N - 1) / N that an operation sends from each of N ranks of a ring: an all-reduce scatters sums, then gathers them."""

GLOO = RING | {"reduce_scatter": 2.0}
"""The same of what torch's gloo makes of them."""

LAUNCHER = re.compile(r"^.*torch/distributed/elastic/.*$", re.MULTILINE)
"""A line of torchrun's own."""

COMMON = (
    "stage=train", "model=tiny", "stage.batch_size=1", "stage.gradient_accumulation=2", "stage.sample_every=0", "stage.evaluate_every=0",
    "stage.save_every=0", "tracking.wandb=disabled",
)  # fmt: skip
"""Two micro steps, so that what is sent at each of them shows."""


@dataclass(frozen=True)
class Case:
    """A training that is counted. ``reuse``: elements within which ZeRO-3 keeps what it gathered, ``None`` for DeepSpeed's own."""

    name: str
    words: tuple[str, ...]
    reuse: int | None = None

    @property
    def all_words(self) -> list[str]:
        return [*COMMON, *self.words]


CASES = (
    *(Case(f"ZeRO-{stage}", (f"deepspeed=zero{stage}",)) for stage in range(4)),
    Case("ZeRO-2, bf16", ("deepspeed=zero2", "model.dtype=bf16")),
    Case("ZeRO-3, bf16, averages", ("deepspeed=zero3", "model.dtype=bf16", "stage.ema_decay=0.9")),
    Case("ZeRO-3, holds 1.6e6 elements", ("deepspeed=zero3", "deepspeed.allgather_bucket_size=400_000"), 0),
    Case(
        "ZeRO-3, recomputed, reuse within 4e6",
        ("deepspeed=zero3", "deepspeed.activation_checkpointing=true"),
        4_000_000,
    ),
)
"""Weights of the tiny model are 3.1e6 elements: ZeRO-3 by itself gathers them once and keeps them, so the last two let it keep less."""


def compare(
    cases: Sequence[Case] = CASES, worlds: Sequence[int] = RANKS, advance: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """One row for each case and number of ranks: bytes of one step from rank 0, as planned and as counted. Starts the ranks itself.

    Raises :class:`CogflowError` with the last lines of what they wrote when they fail.
    """
    rows = []
    for world in worlds:
        found = measure(cases, world)
        rows += [row(case, world, one) for case, one in zip(cases, found, strict=True)]
        if advance:
            advance(1)
    return rows


def measure(cases: Sequence[Case], world: int) -> list[dict[str, Any]]:
    """What :mod:`cogflow.benchmarking.traffic_rank` counts of each case on ``world`` processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        asked, results = Path(folder) / "cases.json", Path(folder) / "results.json"
        asked.write_text(
            json.dumps([{"words": case.all_words, "reuse": case.reuse} for case in cases]), encoding="utf-8"
        )
        start = [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
            "-m",
            "cogflow.benchmarking.traffic_rank",
        ]
        # On a machine with GPUs, too: it is gloo's traffic that the kernel counts.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-m", *start, str(asked), str(results)],
            capture_output=True,
            text=True,
            env=env,
            check=False,
        )
        if done.returncode or not results.is_file():
            # What the launcher says of its ranks follows what they said themselves, and is longer.
            own = LAUNCHER.split(done.stderr, maxsplit=1)[0] or done.stderr
            raise CogflowError(f"The trainings on {world} ranks ended with {done.returncode}:\n{own[-2000:]}")
        found: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))
        return found


def row(case: Case, world: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """Megabytes (10^6) of one step from one rank. ``other``: counted beside gradients and weights, such as the losses of the log."""
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


def predicted(case: Case, world: int) -> traffic.Traffic:
    """The plan's figures for ``case``."""
    config = compose(case.all_words)
    own, _ = transformer_size.of_model(config.model)
    dtype = "fp32" if config.model.dtype == "auto" else config.model.dtype
    layout = gpu_layout.of_config(config, dtype, world)
    tokens = transformer_size.tokens(own, config.data.frames, config.data.height, config.data.width)
    return traffic.traffic(own, tokens, layout if case.reuse is None else replace(layout, reuse=case.reuse))


def told(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far plan and trainings are apart at the worst, in words."""
    several = [row for row in rows if row["ranks"] > 1]
    apart = {
        what: max((_apart(row[f"{what}, planned"], row[f"{what}, counted"]) for row in several), default=0.0)
        for what in ("gradients", "weights")
    }
    wire = max((_apart(row["TCP, of gloo's algorithms"], row["TCP, measured"]) for row in several), default=0.0)
    return (
        f"traffic: the plan is off by at most {apart['gradients']:.1%} for gradients and {apart['weights']:.1%} for weights over "
        f"{len(several)} trainings; TCP carries within {wire:.1%} of what gloo's algorithms send"
    )


def _apart(planned: float, counted: float) -> float:
    return abs(planned - counted) / max(planned, counted) if planned or counted else 0.0
