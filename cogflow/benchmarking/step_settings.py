"""Time a training step as configured (stage.what=step), and several settings of it side by side (stage.what=train).

Each setting runs in a process of its own, so that none inherits another's memory or compiled code.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter

from cogflow.benchmarking.results import BenchmarkResult, Cell
from cogflow.benchmarking.step import StepCost, measure_step
from cogflow.config.benchmark_settings import BenchmarkStage
from cogflow.config.command import override
from cogflow.config.config import Config
from cogflow.errors import DataError
from cogflow.files.record_io import read_record
from cogflow.records.run_records import StageRecord
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.runtime.progress import progress

COLUMNS = (
    "settings",
    "s a step",
    "lowest",
    "highest",
    "ratio to the first",
    "clips a second",
    "MFU",
    "HFU",
    "peak GB",
    "start s",
)

OUTER_KEYS = ("stage.what=", "stage.settings=", "run.root=", "run.name=", "tracking.")
"""Settings of the comparison itself, which are not passed to its processes."""

RECORD = "benchmark.json"

GPU_SETTINGS = (
    "",
    "speed.compile=off speed.attention=flash deepspeed.checkpoint_keep=nothing",
    "speed.attention=flash",
    "speed.compile=off",
    "deepspeed.checkpoint_keep=nothing",
    "deepspeed.checkpoint_keep=attention",
    "deepspeed.checkpoint_keep=products",
    "deepspeed.checkpoint_keep=all",
    "deepspeed.checkpoint_every_block=0",
    "deepspeed.activation_checkpointing=false",
    "speed.compile=graphs",
    "deepspeed.reduce_dtype=model",
    "deepspeed=zero3",
    "",
)
"""Settings that a GPU compares by default. The last one repeats the first, which shows the drift of the machine."""

RECOMPUTED = "deepspeed.activation_checkpointing=true"
CPU_SETTINGS = (
    "",
    "speed.attention=math",
    "speed.compile=blocks",
    f"{RECOMPUTED} deepspeed.checkpoint_keep=nothing",
    f"{RECOMPUTED} deepspeed.checkpoint_keep=attention",
    f"{RECOMPUTED} deepspeed.checkpoint_keep=products",
    f"{RECOMPUTED} deepspeed.checkpoint_keep=all",
    f"{RECOMPUTED} deepspeed.checkpoint_keep=all speed.compile=blocks",
    "",
)
"""Settings that a CPU compares by default."""

AS_CONFIGURED = "as configured"


@dataclass(frozen=True)
class SettingResult:
    """One compared setting. ``step``: ``None`` where it did not run, for the reason ``problem``."""

    words: str
    step: StepCost | None
    problem: str = ""


def measure_configured_step(config: Config[BenchmarkStage], folder: Path) -> BenchmarkResult:
    """Measure one step as it is configured. All ranks train, and rank 0 reports."""
    with progress(1 + config.stage.repeats, "turns") as bar:
        cost = measure_step(config, bar.advance)
    for line in profile_lines(cost):
        echo(line)
    return BenchmarkResult(
        summary=summary_line(cost),
        columns=COLUMNS,
        rows=[row(SettingResult(AS_CONFIGURED, cost), cost)],
        details={"step": asdict(cost)},
    )


def profile_lines(cost: StepCost) -> list[str]:
    """Return one line per part of a profile, sorted by the time above the part's floor, largest first."""
    parts = sorted(cost.profile, key=lambda part: part.floor - part.seconds)
    return [
        f"{part.kind}: {1000 * part.seconds:.1f} ms, floor {1000 * part.floor:.1f} ms, {part.launches} launches"
        + "".join(f"\n    {1000 * seconds:.1f} ms {name[:100]}" for name, seconds in part.largest)
        for part in parts
    ]


def compare_settings(config: Config[BenchmarkStage], folder: Path) -> BenchmarkResult:
    """Measure each of ``stage.settings`` in turn, together with the other words of this command line."""
    place = folder / "benchmark"
    place.mkdir(parents=True, exist_ok=True)
    chosen = config.stage.settings or (GPU_SETTINGS if torch.cuda.is_available() else CPU_SETTINGS)
    results = []
    with progress(len(chosen), "settings") as bar:
        for number, setting in enumerate(chosen):
            results.append(run_setting(sys.argv[1:], setting, place / f"setting-{number:02d}"))
            bar.advance(1)
    return settings_result(results, place)


def run_setting(
    words: Sequence[str], setting: str, folder: Path, *, name: str = "", cwd: Path | None = None
) -> SettingResult:
    """Run stage.what=step in a process with ``words`` and ``setting``, whose words replace those with the same key.

    ``folder``: parent of the process's run folder. ``cwd``: the checkout whose cogflow runs, by default this one.
    """
    changed = {word.split("=")[0] for word in setting.split()}
    kept = [word for word in words if not word.startswith(OUTER_KEYS) and word.split("=")[0] not in changed]
    where = [override("run.root", folder.resolve()), "run.name=step", "tracking.wandb=disabled"]
    command = [sys.executable, "-m", "cogflow", *kept, *setting.split(), "stage=benchmark", "stage.what=step", *where]
    done = subprocess.run(list(dict.fromkeys(command)), capture_output=True, text=True, check=False, cwd=cwd)
    record = folder / "step" / RECORD
    name = name or setting or AS_CONFIGURED
    if done.returncode or not record.is_file():
        output = [line.strip() for line in (done.stderr.strip() or done.stdout).splitlines() if line.strip()]
        return SettingResult(name, None, " ".join(output[-2:]) or f"exit code {done.returncode}")
    return SettingResult(name, TypeAdapter(StepCost).validate_python(read_record(record, StageRecord).results["step"]))


def settings_result(results: Sequence[SettingResult], folder: Path) -> BenchmarkResult:
    """Return the table of ``results``. The summary names the fastest setting.

    ``folder``: holds the runs of the settings. Raises :class:`DataError` if no setting ran.
    """
    ran = [result for result in results if result.step]
    if not ran:
        raise DataError(f"No setting ran: {results[0].problem}", f"The first runs as it is configured; see {folder}.")
    first, best = ran[0].step, min(ran, key=lambda result: _median_seconds(result.step))
    assert first is not None and best.step is not None
    return BenchmarkResult(
        summary=f"train: {best.words} is the fastest of {len(results)} settings; {summary_line(best.step)}",
        columns=COLUMNS,
        rows=[row(result, first) for result in results],
        details={
            "rows": [
                {"settings": r.words, "step": asdict(r.step) if r.step else None, "problem": r.problem} for r in results
            ]
        },
    )


def _median_seconds(step: StepCost | None) -> float:
    return step.times.median if step and step.times else float("inf")


def row(result: SettingResult, first: StepCost) -> list[Cell]:
    """Return the cells of :data:`COLUMNS`. For a setting that did not run the first cell states the problem."""
    step = result.step
    if step is None or step.times is None:
        return [f"{result.words}: {result.problem[:80]}", *[None] * (len(COLUMNS) - 1)]
    times = step.times
    ratio = times.median / _median_seconds(first)
    return [
        result.words,
        times.median,
        times.lowest,
        times.highest,
        ratio,
        times.clips,
        step.mfu,
        "" if step.hfu is None else step.hfu,
        step.memory["peak"],
        "" if step.start_seconds is None else step.start_seconds,
    ]


def summary_line(step: StepCost) -> str:
    """Return one line about the cost of a step; empty on all ranks but 0."""
    if not ranks.is_main():
        return ""
    if step.times is None or step.mfu is None:
        return "nothing was measured"
    line = f"{step.times.median:.3g} s a step of {step.model} at {step.size} ({step.tokens} tokens), "
    line += f"MFU {step.mfu:.1%} of {step.device_peak.flops / 1e12:.3g} TFLOP/s, "
    line += f"peak {step.memory['peak']:.1f} GB"
    if step.ratio_to_other:
        line += f", {step.ratio_to_other - 1:+.1%} beside a bare loop"
    return line
