"""stage=benchmark: what one part of cogflow costs, or how well it does its work, measured in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from cogflow.benchmarking import alarm, steps
from cogflow.benchmarking.assemble import compare_assemble
from cogflow.benchmarking.checkpoint_cost import checkpoints
from cogflow.benchmarking.clips import contents
from cogflow.benchmarking.degrade import CLEAN
from cogflow.benchmarking.export import compare_export
from cogflow.benchmarking.indicator import measure as measure_indicator
from cogflow.benchmarking.loader_cost import loading
from cogflow.benchmarking.overhead import SIZES, WARM_UP, told
from cogflow.benchmarking.overhead import compare as compare_steps
from cogflow.benchmarking.panel_cost import WHOLE, cost
from cogflow.benchmarking.prepare_cost import preparing
from cogflow.benchmarking.separation import DEGRADATIONS, figures, gather
from cogflow.benchmarking.tables import Table, shown
from cogflow.benchmarking.traffic import RANKS
from cogflow.benchmarking.traffic import compare as compare_traffic
from cogflow.benchmarking.traffic import told as told_traffic
from cogflow.benchmarking.validation_cost import validation
from cogflow.config.schema import BenchmarkStage, Config
from cogflow.errors import CogflowError, DataError
from cogflow.files.paths import run_folder
from cogflow.runtime import ranks
from cogflow.runtime.console import echo, table
from cogflow.runtime.progress import progress
from cogflow.sharpness.watch_noise_model import MEASURED
from cogflow.tracking.html_report import record_stage
from cogflow.tracking.tracker import open_tracker

FIGURES = ("seconds", "ratio_to_cp", "gb_per_second", "peak_anonymous_gb", "peak_resident_gb")
PANEL_CLIP = (49, 480, 720)  # frames, height and width of the clip that CogVideoX makes, which the panel is timed on
SHOWN = ("blur", "edge_sharpness", "reblur", "wavelet_ratio", "blur_effect", "temporal_sharpness", "contrast", "grain")


def run(config: Config[BenchmarkStage]) -> None:
    """Measure ``stage.what``, print a table and write ``<run>/benchmark.json``. One process, but for a step."""
    stage = config.stage
    if stage.what == "step":
        ranks.setup()
    elif not ranks.is_main():
        return
    started = time.time()
    folder = run_folder(config.run)
    found: dict[str, dict[str, Any]] = {}
    for what in ALL if stage.what == "all" else (stage.what,):
        try:
            found[what] = _measured(config, stage, what, folder)
        except CogflowError as error:
            if stage.what != "all":
                raise
            found[what] = {"summary": f"{what}: not measured: {error}"}
    if not ranks.is_main():
        return
    results = (
        {"summary": "\n".join(str(one["summary"]) for one in found.values()), **found}
        if stage.what == "all"
        else found[stage.what]
    )
    record = record_stage(folder, "benchmark", config, {"what": stage.what}, results, started=started)
    echo(f"{results['summary']}\nrecord: {record}")


def _measured(config: Config[BenchmarkStage], stage: BenchmarkStage, what: str, folder: Path) -> dict[str, Any]:
    """The results of one benchmark, whose table is printed and logged by rank 0."""
    results, (columns, rows) = WHAT[what](config, stage, folder)
    if ranks.is_main():
        table([[shown(cell) for cell in row] for row in rows], columns)
        with open_tracker(config, "benchmark", folder) as tracker:
            tracker.table(f"benchmark/{what}", columns, rows)
    return results


def export(config: Config[BenchmarkStage], stage: BenchmarkStage, folder: Path) -> tuple[dict[str, Any], Table]:
    """Speed and memory of an export beside cp and the converters there are."""
    place = Path(stage.folder).expanduser() if stage.folder else folder / "benchmark"
    clone = Path(stage.vs).expanduser() if stage.vs else None
    rows = compare_export(place, config.model.name, stage.layers, stage.repeats, clone, stage.keep)
    medians = {
        way: middle([row for row in rows if row["way"] == way]) for way in dict.fromkeys(row["way"] for row in rows)
    }
    ours = medians["cogflow, verified"]
    line = f"export: {shown(ours['ratio_to_cp'])} x cp, {shown(ours['peak_anonymous_gb'])} GB anonymous"
    cells = [[way, *(values[name] for name in FIGURES)] for way, values in medians.items()]
    return {"summary": line, "rows": rows, "medians": medians}, (["way", *FIGURES], cells)


def assemble(config: Config[BenchmarkStage], stage: BenchmarkStage, folder: Path) -> tuple[dict[str, Any], Table]:
    """Time and memory of putting a whole pipeline together, linked and copied, beside cp and save_pretrained."""
    place = Path(stage.folder).expanduser() if stage.folder else folder / "benchmark"
    size, rows = compare_assemble(place, config.model.name, stage.layers, stage.repeats, stage.keep)
    names = [name for name in FIGURES if name != "ratio_to_cp"]
    medians = {
        way: middle([row for row in rows if row["way"] == way], names)
        for way in dict.fromkeys(row["way"] for row in rows)
    }
    ours = medians["cogflow, linked"]
    line = f"assemble: {size / 1e9:.1f} GB linked in {shown(ours['seconds'])} s with {shown(ours['peak_anonymous_gb'])} GB anonymous"
    return {"summary": line, "bytes": size, "rows": rows, "medians": medians}, (
        ["way", *names], [[way, *values.values()] for way, values in medians.items()],
    )  # fmt: skip


def panel(config: Config[BenchmarkStage], stage: BenchmarkStage, folder: Path) -> tuple[dict[str, Any], Table]:
    """Time and memory of the sharpness panel on one clip, and whether a GPU agrees with the CPU."""
    found = cost(*PANEL_CLIP, stage.repeats)
    rows = found["rows"]
    whole = [f"{row['seconds']:.3f} s on {row['device']}" for row in rows if row["part"] == WHOLE]
    line = f"panel: one clip of {'x'.join(map(str, PANEL_CLIP))} in {', '.join(whole)}"
    if found["disagreement"]:
        line += f"; CPU and GPU differ by at most {max(found['disagreement'].values()):.1e}"
    cells = [[row["device"], row["part"], row["seconds"], row["cpu_seconds"], row["peak_gb"]] for row in rows]
    return {"summary": line, **found}, (["device", "part", "seconds", "seconds of all cores", "peak GB"], cells)


def separation(config: Config[BenchmarkStage], stage: BenchmarkStage, folder: Path) -> tuple[dict[str, Any], Table]:
    """What the panel tells apart on real clips, at the size of ``data.frames``, ``data.height`` and ``data.width``."""
    place = Path(stage.clips).expanduser() if stage.clips else None
    if place is not None and not place.exists():
        raise DataError(f"stage.clips={place} does not exist.", "Give a folder of videos, or leave it out.")
    chosen = contents(place)
    if stage.contents:
        chosen = chosen[:: max(1, len(chosen) // stage.contents)][: stage.contents]
    size = (config.data.frames, config.data.height, config.data.width)
    with progress(len(chosen), "contents") as bar:
        panels = gather(chosen, stage.variants, *size, advance=bar.advance)
    if not panels:
        raise DataError(
            f"No clip is large enough for {size[1]}x{size[2]}.",
            "Give larger clips, or a smaller data.height and data.width.",
        )
    found = figures(panels)
    cells = [
        [
            name,
            *(found["auc"][name][channel] for channel in SHOWN),
            found["unpaired"][name]["blur"],
            spelled(found["kinds"][name]),
        ]
        for name in found["auc"]
    ]
    line = (
        f"separation: {found['contents']} contents, {found['pairs']} pairs at {'x'.join(map(str, size))}; gauss 0.8 AUC "
        f"{found['auc']['gauss 0.8']['blur']:.3f}; monotone on {found['monotone']:.0%}; confounds change the blur verdict in at most "
        f"{max(found['blur_verdict_changed'].values()):.1%} of pairs"
    )
    return {"summary": line, **found}, (["degradation", *SHOWN, "blur, unpaired", "named in the alarms"], cells)


def watch(config: Config[BenchmarkStage], stage: BenchmarkStage, folder: Path) -> tuple[dict[str, Any], Table]:
    """How often the watch sees blur, and how often it cries for nothing, simulated on real clips (:mod:`cogflow.benchmarking.alarm`)."""
    chosen = contents(Path(stage.clips).expanduser() if stage.clips else None)
    size = (config.data.frames, config.data.height, config.data.width)
    with progress(len(chosen), "contents") as bar:
        few = {name: DEGRADATIONS[name] for name in (CLEAN, "gauss 0.8", "gauss 1")}
        panels = gather(chosen, max(2, stage.variants), *size, advance=bar.advance, degradations=few)
    if len(panels) < 4:
        raise DataError(
            f"{len(panels)} clips are large enough for {size[1]}x{size[2]}; 4 are needed.", "Give more or larger clips."
        )
    with progress(len(alarm.TRIALS), "trials") as bar:
        rows = alarm.tell(panels, MEASURED, stage.share, advance=bar.advance)
    usual = rows[next(place for place, trial in enumerate(alarm.TRIALS) if "rounds" in trial)]
    line = f"watch: {len(panels)} contents; {usual['prompts']} prompts, drift {usual['drift']}: {usual['false alarms']} false alarms in "
    line += f"{usual['rounds']} rounds; gauss 1 at once {usual['gauss 1, first']}, gauss 0.8 within three {usual['gauss 0.8, third']}"
    line += f" of {usual['damaged']}"
    nulls = alarm.calibrate(panels, MEASURED)
    cells = [[spelled_counts(cell) if isinstance(cell, dict) else cell for cell in row.values()] for row in rows]
    return {"summary": line, "rows": rows, "nulls": asdict(nulls)}, (list(rows[0]), cells)


def indicator(config: Config[BenchmarkStage], stage: BenchmarkStage, folder: Path) -> tuple[dict[str, Any], Table]:
    """What the per-step indicator costs beside a step of the tiny model, and at 49x480x720."""
    device = ranks.device()
    found = [
        {**asdict(cost), "share": cost.share, "device": str(device)}
        for cost in measure_indicator(device, max(3, stage.repeats))
    ]
    tiny = found[0]
    line = f"indicator: {1000 * tiny['indicator']:.2f} ms beside a step of {1000 * tiny['step']:.0f} ms on {device}, {tiny['share']:.2%}"
    columns = ["name", "indicator", "step", "share"]
    return {"summary": line, "rows": found}, (
        columns,
        [["" if row[name] is None else row[name] for name in columns] for row in found],
    )


def overhead(config: Config[BenchmarkStage], stage: BenchmarkStage, folder: Path) -> tuple[dict[str, Any], Table]:
    """What cogflow's training step costs beside a bare DeepSpeed loop on the same engine and clips."""
    with (
        open_tracker(config, "benchmark", folder) as tracker,
        progress(len(SIZES) * (max(3, stage.repeats) + WARM_UP), "turns") as bar,
    ):
        rows = compare_steps(config, stage, tracker, bar.advance)
    line = "; ".join(told(row) for row in rows)
    return {"summary": f"overhead: {line}", "rows": rows}, (list(rows[0]), [list(row.values()) for row in rows])


def traffic(config: Config[BenchmarkStage], stage: BenchmarkStage, folder: Path) -> tuple[dict[str, Any], Table]:
    """What a plan says that a step sends, beside what trainings of the tiny model on 1, 2 and 4 ranks of this machine send."""
    with progress(len(RANKS), "numbers of ranks") as bar:
        rows = compare_traffic(advance=bar.advance)
    return {"summary": told_traffic(rows), "rows": rows}, (list(rows[0]), [list(row.values()) for row in rows])


WHAT: dict[str, Callable[[Config[BenchmarkStage], BenchmarkStage, Path], tuple[dict[str, Any], Table]]] = {
    "export": export,
    "assemble": assemble,
    "panel": panel,
    "separation": separation,
    "watch": watch,
    "indicator": indicator,
    "overhead": overhead,
    "traffic": traffic,
    "checkpoint": checkpoints,
    "validate": validation,
    "prepare": preparing,
    "loader": loading,
    "step": steps.step,
    "train": steps.train,
}


ALL = (
    "train",
    "overhead",
    "checkpoint",
    "validate",
    "prepare",
    "loader",
    "export",
    "assemble",
    "panel",
    "indicator",
    "traffic",
)
"""What stage.what=all measures, one after another: all but the judgement of the panel and the watch."""


def middle(rows: list[dict[str, Any]], names: Sequence[str] = FIGURES) -> dict[str, float | None]:
    """Median of each figure over the repeats that ended well."""
    found = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    return {name: median(values) if values else None for name, values in found.items()}


def spelled(kinds: dict[str, float]) -> str:
    """Kinds that at least one pair in twenty raises."""
    return ", ".join(
        f"{kind} {share:.0%}" for kind, share in sorted(kinds.items(), key=lambda item: -item[1]) if share >= 0.05
    )


def spelled_counts(kinds: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in kinds.items())
