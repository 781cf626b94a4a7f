"""Report the ladder: on the terminal, in metrics.jsonl, in W&B and in the run's report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from cogflow.ladder.ladder_record import read_ladder, write_ladder
from cogflow.ladder.rung import Rung
from cogflow.ladder.rung_findings import evaluate_ladder
from cogflow.records.ladder_records import ChangeInterval, DecodingVariant, LadderFinding, LadderRecord, LadderRow
from cogflow.runtime import ranks
from cogflow.runtime.console import echo, table
from cogflow.tracking.tracker import Tracker

SHOWN_CHANGES = ("blur", "contrast", "grain")
COLUMNS = ["rung", "step", "clips", "against", "pairs", *SHOWN_CHANGES, "PSNR", "verdict"]
LOGGED_CHANGES = ("blur", "contrast", "grain", "motion", "artefacts")
SHEETS = ("clips", "samples")
RENEWAL = {Rung.EXPORTED: "export again"}
"""Name of the command that measures a stale rung again."""
TITLE_LENGTH = 63  # characters of an alert's title


def report_ladder(tracker: Tracker, folder: Path, step: int = 0) -> list[LadderFinding]:
    """Evaluate ``folder/ladder.json``, write table and findings back, report them, and return the findings.

    The table goes to the terminal and to W&B (``ladder/rungs``), numbers to ``metrics.jsonl`` at ``step``
    (``ladder/rung2_blur``, ...). A finding that was not reported before is an alert. Rank 0 only; other ranks do
    nothing.
    """
    if not ranks.is_main():
        return []
    ladder = read_ladder(folder)
    reported = {_key(finding) for finding in ladder.findings}
    rows, findings = evaluate_ladder(ladder, folder)
    write_ladder(folder, dataclasses.replace(ladder, findings=findings, table=rows))
    if not rows:
        return []
    decoders = decoder_cells(ladder.rungs.roundtrip.variants) if ladder.rungs.roundtrip is not None else []
    table([*map(table_cells, rows), *decoders], COLUMNS)
    for row in rows:
        if row.renewal:
            # On a line of its own: a command that is folded into a column cannot be copied.
            echo(f"note: rung {row.rung} is {row.stale}: {RENEWAL[Rung(row.rung)]}: {row.renewal}")
    tracker.table("ladder/rungs", COLUMNS, [*(table_cells(row, with_command=True) for row in rows), *decoders])
    tracker.log(step, logged_values(rows))
    for name in SHEETS:
        if (path := folder / "ladder" / f"{name}.png").is_file():
            tracker.image(step, f"ladder/{name}", path)
    for finding in findings:
        if _key(finding) not in reported and not _is_alerted_by_watch(ladder, finding):
            title = f"rung {finding.rung} ({Rung(finding.rung).title}): {finding.defect.replace('_', ' ')}"
            level = "ERROR" if finding.level == "alarm" else "WARN"
            tracker.alert(title[:TITLE_LENGTH], finding.line, level)
    return findings


def table_cells(row: LadderRow, *, with_command: bool = False) -> list[str | int]:
    """Return one row of the table as it is shown; changes as the median and its 95 % interval.

    ``with_command``: the verdict on a stale row ends with the command that measures it again.
    """
    against = "" if row.against is None else f"{row.against} {Rung(row.against).title}"
    pairs = str(row.pairs) if row.paired else "as groups"
    step = "" if row.step is None else str(row.step)
    if row.line is not None and row.line > 1:
        step += f" (line {row.line})"
    renewal = f": {RENEWAL[Rung(row.rung)]}: {row.renewal}" if row.renewal and with_command else ""
    return [
        f"{row.rung} {row.name}",
        step,
        row.count,
        against,
        "" if row.against is None else pairs,
        *(_interval_text(row.changes.get(name)) for name in SHOWN_CHANGES),
        "" if row.psnr is None else f"{row.psnr:.1f} dB",
        row.verdict + renewal,
    ]


def decoder_cells(decoders: Mapping[str, DecodingVariant]) -> list[list[str | int]]:
    """Return a row of the table for each precision and tiling of the VAE."""
    rung = Rung.ROUNDTRIP.value
    return [
        [
            f"{rung} in {name}",
            "",
            1,
            f"{rung} in fp32",
            "1",
            *("" for _ in SHOWN_CHANGES),
            "" if trial.psnr is None else f"{trial.psnr:.1f} dB",
            _decoder_verdict(trial),
        ]
        for name, trial in decoders.items()
    ]


def logged_values(rows: list[LadderRow]) -> dict[str, float]:
    """Return flat names and values for metrics.jsonl; stale rows are left out, because they are of another step."""
    values: dict[str, float] = {}
    for row in rows:
        if row.stale:
            continue
        prefix = f"ladder/rung{row.rung}"
        values |= {f"{prefix}_{name}": row.changes[name].size for name in LOGGED_CHANGES if name in row.changes}
        if row.psnr is not None:
            values[f"{prefix}_psnr"] = row.psnr
    return values


def _key(finding: LadderFinding) -> tuple[int, str, str, str, str]:
    """Return a key that is equal for findings that differ in size and wording only."""
    return finding.rung, finding.defect, finding.level, finding.field, finding.metric


def _interval_text(change: ChangeInterval | None) -> str:
    return "" if change is None else f"{change.size:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"


def _decoder_verdict(trial: DecodingVariant) -> str:
    if trial.failed:
        return trial.failed
    if trial.finite is not None and trial.finite != 1:
        return f"{100 * (1 - trial.finite):.2g} % of the values are not finite"
    return "in use" if trial.chosen else ""


def _is_alerted_by_watch(ladder: LadderRecord, finding: LadderFinding) -> bool:
    """Return whether the quality watch sends the alert, with pictures."""
    return finding.rung == Rung.TUNED and ladder.rungs.tuned is not None and ladder.rungs.tuned.watch is not None
