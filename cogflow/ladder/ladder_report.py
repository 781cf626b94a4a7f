"""The ladder told: on the terminal, in metrics.jsonl, in W&B, in the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogflow.ladder import store
from cogflow.ladder.comparison import NAMES, Row, RungFinding
from cogflow.ladder.rungs import work_out
from cogflow.runtime import ranks
from cogflow.runtime.console import table
from cogflow.tracking.tracker import Tracker

COLUMNS = ["rung", "clips", "against", "pairs", "blur", "contrast", "grain", "PSNR", "verdict"]
LOGGED = ("blur", "contrast", "grain", "motion", "artefacts")
SHEETS = ("clips", "samples")


def tell(tracker: Tracker, folder: Path, step: int = 0) -> list[RungFinding]:
    """Work out the table and the findings of ``folder/ladder.json`` from its panels, write them back, tell them, and return the findings.

    The table goes to the terminal and to W&B (``ladder/rungs``), numbers to ``metrics.jsonl`` at ``step`` (``ladder/rung2_blur``, ...).
    A finding that was not told before is an alert. Rank 0 only; elsewhere it does nothing.
    """
    if not ranks.is_main():
        return []
    ladder = store.read(folder)
    told = {
        (one.get("rung"), one.get("kind"), one.get("level"), one.get("field"), one.get("channel"))
        for one in ladder["findings"]
    }
    rows, findings = work_out(ladder)
    lines = [cells(row) for row in rows] + variant_cells(ladder.get("variants", {}))
    ladder |= {"findings": [one.as_dict() for one in findings], "table": [row.as_dict() for row in rows]}
    store.save(folder, ladder)
    if not rows:
        return []
    table(lines, COLUMNS)
    tracker.table("ladder/rungs", COLUMNS, lines)
    tracker.log(step, numbers(rows))
    for name in SHEETS:
        if (path := folder / "ladder" / f"{name}.png").is_file():
            tracker.image(step, f"ladder/{name}", path)
    alerted = "watch" in ladder["rungs"].get("4", {}).get("facts", {})  # the watch sends its own alerts, with pictures
    for one in findings:
        if one.rung == 4 and alerted:
            continue
        if (one.rung, one.kind, one.level, one.field, one.channel) not in told:
            title = f"rung {one.rung} ({NAMES[one.rung]}): {one.kind.replace('_', ' ')}"
            tracker.alert(title[:63], one.line, "ERROR" if one.level == "alarm" else "WARN")
    return findings


def cells(row: Row) -> list[Any]:
    """One row of the table as it is shown; changes as the median and its 95 % interval."""
    shown = [str(row.changes[name]) if name in row.changes else "" for name in ("blur", "contrast", "grain")]
    against = "" if row.against is None else f"{row.against} {NAMES[row.against]}"
    pairs = "" if row.against is None else str(row.pairs) if row.paired else "as groups"
    return [
        f"{row.rung} {NAMES[row.rung]}",
        row.count,
        against,
        pairs,
        *shown,
        "" if row.psnr is None else f"{row.psnr:.1f} dB",
        row.verdict,
    ]


def variant_cells(variants: Mapping[str, Any]) -> list[list[Any]]:
    """A row for each precision and tiling of the VAE."""
    rows: list[list[Any]] = []
    for name, one in (variants.get("2") or {}).items():
        psnr, finite = one.get("psnr"), one.get("finite")
        verdict = one.get("failed") or (
            "" if finite is None or finite == 1 else f"{100 * (1 - finite):.2g} % of the values are no numbers"
        )
        shown = f"{psnr:.1f} dB" if psnr is not None else ""
        rows.append(
            [f"2 in {name}", 1, "2 in fp32", "1", "", "", "", shown, verdict or ("in use" if one.get("chosen") else "")]
        )
    return rows


def numbers(rows: list[Row]) -> dict[str, float]:
    """Flat names for metrics.jsonl."""
    values: dict[str, float] = {}
    for row in rows:
        values |= {f"ladder/rung{row.rung}_{name}": row.changes[name].size for name in LOGGED if name in row.changes}
        if row.psnr is not None:
            values[f"ladder/rung{row.rung}_psnr"] = row.psnr
    return values
