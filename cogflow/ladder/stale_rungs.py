"""Find rungs that do not belong to the present step, line or clips of a run, and the command that renews them.

Training replaces the tuned rung at each validation, and an export measures the exported rung once. A row of the ladder
is compared with the rung of its own step, and a row of another step than the newest tuned rung is stale.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from cogflow.artifacts.run_layout import SAMPLES_RECORD, RunLayout, step_name
from cogflow.config.command import PROGRAM, command, command_again, command_of
from cogflow.config.run_section import run_at
from cogflow.errors import UserError
from cogflow.files.record_io import read_record
from cogflow.ladder.ladder_record import rung_record
from cogflow.ladder.rung import Rung
from cogflow.ladder.rung_comparison import MetricsByName
from cogflow.records.ladder_records import ExportedRung, LadderRecord, TunedRung
from cogflow.records.run_records import StageRecord
from cogflow.sampling.sample_record import read_sample_record

STAGES = ("export", "assemble")
"""Stages that make and measure the exported rung."""


@dataclass(frozen=True)
class Partner:
    """The rung that a rung is compared with, and its metrics. ``missing``: why there is none although there should
    be.
    """

    rung: Rung | None = None
    metrics: MetricsByName = field(default_factory=dict)
    missing: str = ""


def find_partner(ladder: LadderRecord, rung: Rung, run: Path | None) -> Partner:
    """Return the rung to compare ``rung`` with.

    The roundtrip rung has its own clips' metrics of the clip rung. The exported rung is compared with the tuned rung of
    its own step, which is read from the samples of ``run`` where the ladder has a later one.
    """
    if rung is Rung.SOURCE:
        return Partner()
    if rung is Rung.ROUNDTRIP:
        return Partner(Rung.CLIP, ladder.rungs.roundtrip.clips if ladder.rungs.roundtrip is not None else {})
    if rung is Rung.EXPORTED and ladder.rungs.exported is not None:
        return _tuned_partner(ladder, ladder.rungs.exported, run)
    before = Rung(rung - 1)
    record = rung_record(ladder, before)
    has_metrics = record is not None and (record.metrics or rung is Rung.CLIP)
    return Partner(before, record.metrics) if record is not None and has_metrics else Partner()


def stale_reason(ladder: LadderRecord, rung: Rung) -> str:
    """Return in words why ``rung`` does not belong to the present step or clips; an empty string where it does."""
    rungs = ladder.rungs
    if rung is Rung.ROUNDTRIP and rungs.roundtrip is not None and rungs.clip is not None:
        differs = rungs.clip.cache is not None and rungs.clip.cache != rungs.roundtrip.identity.cache
        return "of other prepared clips than rung 1" if differs else ""
    if rung is not Rung.EXPORTED or rungs.exported is None or rungs.exported.step is None:
        return ""
    step, tuned = rungs.exported.step, rungs.tuned
    if tuned is None or not tuned.metrics or tuned.step is None:
        return f"of step {step}, which is not the present one" if step else ""
    if step != tuned.step:
        return f"of step {step}, {'before' if step < tuned.step else 'after'} the present step {tuned.step}"
    if not _same_line(rungs.exported, tuned):
        return f"of step {step} of line {rungs.exported.line}, before the present line {tuned.line}"
    return ""


def renewal_command(rung: Rung, run: Path | None) -> str:
    """Return the command that measures a stale ``rung`` of ``run`` again, quoted for a shell.

    The exported rung is renewed by the commands that the run's records name, else by the stages with their defaults.
    """
    if rung is not Rung.EXPORTED or run is None:
        return ""
    commands = [_recorded_command(run, stage) or command(stage, {}, run_at(run)) for stage in STAGES]
    return " && ".join(dict.fromkeys(commands))


def _recorded_command(run: Path, stage: str) -> str:
    """Return the command that ran ``stage`` in ``run``, without a fixed source; empty where it is not known.

    A flow would train again with its own number of steps, so that its command is turned into that of the stage.
    """
    try:
        recorded = read_record(run / f"{stage}.json", StageRecord).command
    except UserError:
        return ""
    words = shlex.split(command_again(recorded, run_at(run), without=["stage.source"]))[len(PROGRAM) :]
    if "stage=flow" in words:
        own = [word.replace(f"stage.{stage}.", "stage.", 1) for word in words if word.startswith(f"stage.{stage}.")]
        common = [word for word in words if not word.startswith(("stage.", "stage="))]
        words = [f"stage={stage}", *common, *own]
    return command_of(words) if f"stage={stage}" in words else ""


def _tuned_partner(ladder: LadderRecord, exported: ExportedRung, run: Path | None) -> Partner:
    tuned = ladder.rungs.tuned
    if tuned is not None and tuned.metrics:
        if exported.step in (None, tuned.step) and _same_line(exported, tuned):
            return Partner(Rung.TUNED, tuned.metrics)
    elif not exported.step:  # exported without a step of training
        base = ladder.rungs.base
        return Partner(Rung.BASE, base.metrics) if base is not None and base.metrics else Partner()
    metrics = _sampled_metrics(run, exported.step) if tuned is None or _same_line(exported, tuned) else {}
    if metrics:
        return Partner(Rung.TUNED, metrics)
    return Partner(missing=f"rung {Rung.TUNED} of step {exported.step} is no longer there")


def _same_line(exported: ExportedRung, tuned: TunedRung) -> bool:
    return (exported.line or 1) == (tuned.line or 1)


def _sampled_metrics(run: Path | None, step: int | None) -> MetricsByName:
    """Return the metrics of the samples of ``step``; empty where the run has none."""
    if run is None or step is None:
        return {}
    folder = RunLayout(run).samples / step_name(step)
    try:
        return read_sample_record(folder).metrics() if (folder / SAMPLES_RECORD).is_file() else {}
    except UserError:
        return {}
