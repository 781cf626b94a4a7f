"""Run the measurements that need a GPU within a time budget: ``python -m benchmarks.gpu_session [--cogvideo CLONE]``.

The most valuable measurement runs first. Each measurement runs in its own process with a time limit, and a failure does
not stop the others. The output file is replaced in one step after each measurement, so that an interrupted session
keeps its results. ``--cpu`` runs all measurements on the tiny model without a GPU, to test the session itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.output import RESULTS, new_parser
from cogflow.files.atomic_write import write_json
from cogflow.runtime.console import echo, table

REPOSITORY = Path(__file__).resolve().parents[1]
MINUTES = 12.0
METRICS_SECONDS = 0.020
"""Goal for the metrics of one clip of 49x480x720 on a GPU."""
METRICS_DIFFERENCE = 1e-4
"""Largest allowed difference between GPU and CPU, relative above 1."""
TAIL_LINES = 5


@dataclass(frozen=True)
class Measurement:
    """One command. ``result``: the JSON file that it writes. ``seconds``: its time limit. ``least``: the time that must
    be left to start it.

    ``needs``: the reason why it cannot run, or an empty text.
    """

    name: str
    command: Sequence[str]
    result: Path
    seconds: float
    least: float = 20.0
    needs: str = ""
    goals: Callable[[dict[str, Any]], dict[str, bool]] | None = None


@dataclass(frozen=True)
class Outcome:
    """Outcome of one measurement. ``status``: "done", "failed", "timeout" or "skipped". ``problem``: the last lines of
    output, or the reason for skipping. ``goals``: whether each goal was reached."""

    name: str
    status: str
    seconds: float = 0.0
    problem: str = ""
    command: Sequence[str] = ()
    goals: dict[str, bool] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)


def main(words: Sequence[str] | None = None) -> None:
    """Run the session with the command line ``words`` (default: ``sys.argv``)."""
    parser = new_parser("gpu_session", __doc__)
    parser.add_argument("--cogvideo", type=Path, help="a clone of zai-org/CogVideo, whose own step is measured")
    parser.add_argument("--cogvideo-python", default=sys.executable, help="the interpreter of the clone's environment")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="budget for all measurements, default: %(default)s"
    )
    parser.add_argument("--folder", type=Path, default=RESULTS / "gpu_session", help="folder of the runs (%(default)s)")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="run only these measurements")
    parser.add_argument("--cpu", action="store_true", help="run the tiny model without a GPU")
    given = parser.parse_args(words)
    measurements = list_measurements(
        given.folder.resolve(), cpu=given.cpu, cogvideo=given.cogvideo, python=given.cogvideo_python
    )
    chosen = [measurement for measurement in measurements if not given.only or measurement.name in given.only]
    if unknown := set(given.only) - {measurement.name for measurement in measurements}:
        names = " ".join(measurement.name for measurement in measurements)
        parser.error(f"--only {' '.join(sorted(unknown))}: the measurements are {names}")
    run_session(chosen, 60 * given.minutes, given.output, no_gpu=given.cpu)


def list_measurements(folder: Path, *, cpu: bool, cogvideo: Path | None, python: str) -> list[Measurement]:
    """Return all measurements, the most valuable first. ``folder``: the folder of their runs."""
    model = ["model=tiny"] if cpu else ["model=cogvideox-5b", "deepspeed=zero2"]
    turns = ["stage.steps=1", f"stage.repeats={1 if cpu else 3}"]
    result = folder / "cogvideo_step.json"
    options = [
        "--vs",
        str(cogvideo),
        "--vs-python",
        python,
        "--folder",
        str(folder / "cogvideo"),
        "--output",
        str(result),
    ]
    found = [
        Measurement(
            "cogvideo_step",
            [sys.executable, "-m", "benchmarks.step", *options, *model, *turns],
            result,
            seconds=210,
            least=90,
            needs="" if cogvideo else "--cogvideo CLONE",
        )
    ]
    variants = {
        "zero3": ["deepspeed=zero3"],
        "graphs": ["speed.compile=graphs"],
        "every_block_0": ["deepspeed.activation_checkpointing=true", "deepspeed.checkpoint_every_block=0"],
        "keep_all": ["deepspeed.activation_checkpointing=true", "deepspeed.checkpoint_keep=all"],
    }
    for name, settings in variants.items():
        found.append(_step(f"step_{name}", folder, model, [*settings, *turns]))
        if name == "zero3":
            found.append(_metrics(folder, cpu))
    return [*found, _flow(folder, cpu)]


def _step(name: str, folder: Path, model: Sequence[str], settings: Sequence[str]) -> Measurement:
    groups = {setting.split("=")[0] for setting in settings}
    words = [*(word for word in model if word.split("=")[0] not in groups), *settings]
    run = [f"run.root={folder}", f"run.name={name}", "tracking=off"]
    command = [sys.executable, "-m", "cogflow", "stage=benchmark", "stage.what=step", *words, *run]
    return Measurement(name, command, folder / name / "benchmark.json", seconds=120, least=60)


def _metrics(folder: Path, cpu: bool) -> Measurement:
    result = folder / "metrics.json"
    size = ["--frames", "9", "--height", "64", "--width", "96"] if cpu else []
    command = [sys.executable, "-m", "benchmarks.metrics_cost", *size, "--output", str(result)]
    return Measurement(
        "metrics", [*command, "--repeats", "2" if cpu else "20"], result, seconds=60, goals=metrics_goals
    )


def metrics_goals(results: dict[str, Any]) -> dict[str, bool]:
    """Return whether the metrics are fast and exact enough on the GPU; an empty dictionary without a GPU."""
    if not results["disagreement"]:
        return {}
    seconds = min(row["seconds"] for row in results["rows"] if row["part"].startswith("all metrics"))
    return {
        f"one clip in {1000 * METRICS_SECONDS:.0f} ms": seconds <= METRICS_SECONDS,
        f"GPU and CPU within {METRICS_DIFFERENCE:g}": max(results["disagreement"].values()) <= METRICS_DIFFERENCE,
    }


def _flow(folder: Path, cpu: bool) -> Measurement:
    run = [f"run.root={folder}", "run.name=flow", "tracking.wandb=disabled"]
    dtype = [] if cpu else ["model.dtype=bf16"]
    command = [sys.executable, "-m", "cogflow", "stage=flow", "debug=quick", *dtype, *run]
    return Measurement("tiny_flow", command, folder / "flow" / "flow.json", seconds=150, least=60)


def run_session(
    measurements: Sequence[Measurement], budget: float, output: Path, *, no_gpu: bool = False
) -> list[Outcome]:
    """Run ``measurements`` within ``budget`` seconds and write all outcomes to the file ``output`` after each."""
    began = time.monotonic()
    outcomes: list[Outcome] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    for measurement in measurements:
        left = budget - (time.monotonic() - began)
        echo(f"{measurement.name}: {left:.0f} s left")
        outcomes.append(run_measurement(measurement, left, no_gpu=no_gpu))
        spent = time.monotonic() - began
        write_json(
            output,
            {"budget": budget, "seconds": spent, "measurements": [asdict(outcome) for outcome in outcomes]},
        )
        echo(f"{measurement.name}: {outcomes[-1].status} {outcomes[-1].problem}")
    table(
        [[o.name, o.status, f"{o.seconds:.0f}", o.problem[:80]] for o in outcomes], ["name", "status", "s", "problem"]
    )
    echo(f"results: {output}")
    return outcomes


def run_measurement(measurement: Measurement, left: float, *, no_gpu: bool = False) -> Outcome:
    """Run one command for at most ``left`` seconds and return its outcome. A failing command raises nothing."""
    name, command = measurement.name, list(measurement.command)
    if measurement.needs:
        return Outcome(name, "skipped", problem=f"needs {measurement.needs}", command=command)
    if left < measurement.least:
        return Outcome(
            name, "skipped", problem=f"{left:.0f} s are left, {measurement.least:.0f} are needed", command=command
        )
    measurement.result.unlink(missing_ok=True)
    env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if no_gpu else {})}
    began = time.monotonic()
    status, text = _run(command, min(left, measurement.seconds), env)
    seconds = time.monotonic() - began
    tail = "\n".join(text.splitlines()[-TAIL_LINES:])
    if status != "done":
        return Outcome(name, status, seconds, tail, command)
    try:
        results = json.loads(measurement.result.read_text(encoding="utf-8"))
        goals = measurement.goals(results) if measurement.goals else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Outcome(name, "failed", seconds, f"{measurement.result}: {type(error).__name__}: {error}", command)
    return Outcome(name, "done", seconds, "", command, goals, results)


def _run(command: Sequence[str], limit: float, env: dict[str, str]) -> tuple[str, str]:
    """Run ``command`` in its own process group; return "done", "failed" or "timeout" with its output."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=REPOSITORY,
        env=env,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        return "timeout", f"{text}\nstopped after {limit:.0f} s"
    return ("failed" if process.returncode else "done"), text


if __name__ == "__main__":
    main()
