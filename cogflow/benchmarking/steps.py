"""stage.what=step and train: figures and tables of a training step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from cogflow.benchmarking import peer_step, settings
from cogflow.benchmarking.settings import Found
from cogflow.benchmarking.step import BARE, measure
from cogflow.benchmarking.tables import Table
from cogflow.config.schema import BenchmarkStage, Config
from cogflow.errors import ConfigError, DataError
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.runtime.progress import progress

COLUMNS = [
    "settings",
    "s a step",
    "lowest",
    "highest",
    "against the first",
    "clips a second",
    "MFU",
    "HFU",
    "peak GB",
    "start s",
]


def step(config: Config[BenchmarkStage], stage: BenchmarkStage, folder: Path) -> tuple[dict[str, Any], Table]:
    """One step as it is configured. On several ranks all of them train, and rank 0 tells."""
    if stage.vs not in (None, BARE):
        raise ConfigError(
            f"stage.vs={stage.vs}: stage.what=step runs beside bare alone.",
            "stage.what=train takes clones and revisions.",
        )
    with progress(1 + stage.repeats, "turns") as bar:
        found = measure(config, stage, bar.advance)
    for line in lines(found):
        echo(line)
    return {"summary": told(found), "step": found}, (COLUMNS, [row(Found("as it is", found), found)])


def lines(found: dict[str, Any]) -> list[str]:
    """A profile in words: what takes longest beyond its floor first."""
    parts = sorted(found["profile"], key=lambda part: part["floor"] - part["seconds"])
    return [
        f"{part['kind']}: {1000 * part['seconds']:.1f} ms, floor {1000 * part['floor']:.1f} ms, {part['launches']} launches"
        + "".join(f"\n    {1000 * seconds:.1f} ms {name[:100]}" for name, seconds in part["largest"])
        for part in parts
        if ranks.is_main()
    ]


def train(config: Config[BenchmarkStage], stage: BenchmarkStage, folder: Path) -> tuple[dict[str, Any], Table]:
    """Settings of a step against each other, and against what ``stage.vs`` names."""
    place = folder / "benchmark"
    place.mkdir(parents=True, exist_ok=True)
    clone = Path(stage.vs).expanduser() if stage.vs else None
    usual = settings.USUAL if torch.cuda.is_available() else settings.SMALL
    with progress(len(stage.settings or usual), "settings") as bar:
        found = settings.compare(sys.argv[1:], stage, place, usual, bar.advance)
    if clone is not None and peer_step.is_cogvideo(clone):
        try:
            found.append(
                Found("CogVideo's own step", peer_step.measure(config, stage, clone, stage.vs_python, place / "peer"))
            )
        except DataError as error:
            found.append(Found("CogVideo's own step", None, str(error)))
    first = next((one.step for one in found if one.step), None)
    ran = [one for one in found if one.step]
    if first is None:
        raise DataError(f"No setting ran: {found[0].problem}", f"The first was run as it is configured; see {place}.")
    best = min(ran, key=lambda one: one.step["seconds"]["median"] if one.step else 0.0)
    line = f"train: {best.words} is the quickest of {len(found)}; {told(best.step)}"
    rows = [{"settings": one.words, "step": one.step, "problem": one.problem} for one in found]
    return {"summary": line, "rows": rows}, (COLUMNS, [row(one, first) for one in found])


def row(found: Found, first: dict[str, Any]) -> list[Any]:
    """The cells of :data:`COLUMNS`; what did not run says why."""
    one = found.step
    if one is None:
        return [f"{found.words}: {found.problem[:80]}", *[None] * (len(COLUMNS) - 1)]
    seconds = one["seconds"]
    return [
        found.words, seconds["median"], seconds["lowest"], seconds["highest"], seconds["median"] / first["seconds"]["median"],
        seconds["clips"], one["mfu"], one.get("hfu", ""), one["memory"]["peak"], one.get("start seconds", ""),
    ]  # fmt: skip


def told(found: dict[str, Any] | None) -> str:
    """One step in words."""
    if not found or not found["seconds"]:
        return "nothing was measured"
    line = (
        f"{found['seconds']['median']:.3g} s a step of {found['model']} at {found['size']} ({found['tokens']} tokens), "
    )
    line += f"MFU {found['mfu']:.1%} of {found['ceiling']['flops'] / 1e12:.3g} TFLOP/s, peak {found['memory']['peak']:.1f} GB"
    if found.get("ratio to bare"):
        line += f", {found['ratio to bare'] - 1:+.1%} beside a bare loop"
    return line if ranks.is_main() else ""
