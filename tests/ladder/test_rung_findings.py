"""The evaluation of the ladder: measurements in, table and findings out."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cogflow.config.command import PROGRAM, command, command_of, override
from cogflow.config.run_section import run_at
from cogflow.files.record_io import write_record
from cogflow.ladder.ladder_report import logged_values, table_cells
from cogflow.ladder.rung import Rung
from cogflow.ladder.rung_comparison import compare_groups, compare_pairs, summarize_changes
from cogflow.ladder.rung_findings import evaluate_ladder
from cogflow.records.cache_records import SoftGroup
from cogflow.records.ladder_records import (
    BaseRung,
    ClipRung,
    DecodingVariant,
    ExportedRung,
    FamilyContradiction,
    LadderRecord,
    LadderRungs,
    RoundtripIdentity,
    RoundtripRung,
    ScheduleErrors,
    SourceRung,
    ToleranceRecord,
    TunedRung,
    WatchFinding,
)
from cogflow.records.run_records import MachineRecord, StageRecord
from cogflow.records.sample_records import SampleRecord, SamplesRecord, SamplingRecord
from cogflow.sharpness.metrics import METRICS

PLAIN = dict.fromkeys(METRICS, 0.5) | {
    "finite": 1.0,
    "repeated": 0.0,
    "clipped": 0.0,
    "artefacts": 0.0,
    "wavelet_ratio": -1.0,
}
IDENTITY = RoundtripIdentity("cache", "vae", 0.7, 0.7, "fp32", False, "cpu", 1)
TOLERANCE = ToleranceRecord(2, 50.0)
Named = tuple[int, str, str, str]


def clip(spread: float = 0.0, **changed: float) -> dict[str, float]:
    """Return metrics of a clip, changed at random by ``spread``."""
    moved = {"wavelet_ratio": PLAIN["wavelet_ratio"] + spread, "contrast": PLAIN["contrast"] * (1 + spread)}
    return PLAIN | moved | changed


def prompts(**changed: float) -> dict[str, dict[str, float]]:
    return {f"p{index}": clip(0.01 * index, **changed) for index in range(4)}


SOURCE = SourceRung({"a": clip()}, 8, 8, scaled_up={}, groups=None, sizes={}, soft_style=False)
CLIP = ClipRung({"a": clip()}, 8, upscaled={}, size="96x64", loader={})
ROUNDTRIP = RoundtripRung(
    {"a": clip(-0.02)},
    IDENTITY,
    psnr={"a": 29.0},
    clips={"a": clip()},
    non_finite=[],
    scales={"1": 30.0, "0.607": 19.0},
    variants={"bf16": DecodingVariant(chosen=False, psnr=57.0, finite=1.0)},
)
BASE = BaseRung(prompts(), schedule=ScheduleErrors(1.0, {"1": 0.13, "3": 0.33}))
TUNED = TunedRung(prompts(), 75, "model")
EXPORTED = ExportedRung(prompts(), {"p0": 95.0}, TOLERANCE, failed=False, dtype="fp32")
HEALTHY = LadderRungs(SOURCE, CLIP, ROUNDTRIP, BASE, TUNED, EXPORTED)


def ladder(**rungs: Any) -> LadderRecord:
    """A healthy ladder with the given rungs in place of its own."""
    return LadderRecord(replace(HEALTHY, **rungs))


def named_findings(**rungs: Any) -> list[Named]:
    return [(one.rung, one.defect, one.level, one.field) for one in evaluate_ladder(ladder(**rungs))[1]]


def write_samples_record(folder: Path, metrics: dict[str, dict[str, float]]) -> None:
    sampling = SamplingRecord("default", "DDIM", "empty", 2, 6.0, True, "fp32", False)
    samples = [SampleRecord(name, name, "a caption", 0, f"{name}.mp4", values) for name, values in metrics.items()]
    folder.mkdir(parents=True)
    record = SamplesRecord(6, "sha", sampling, 64, 96, 9, 8.0, 226, "fp32", "cpu", samples)
    write_record(folder / SamplesRecord.file_name, record)


def write_stage_command(run: Path, stage: str, command: str) -> None:
    record = StageRecord(stage, "done", "", "", 1.0, command, str(run), {}, {}, {}, {}, MachineRecord("Linux", 1, 1))
    write_record(run / f"{stage}.json", record)


def test_a_healthy_ladder_has_six_rows_and_no_finding() -> None:
    rows, findings = evaluate_ladder(ladder())
    assert findings == [] and [row.rung for row in rows] == list(Rung)
    assert [row.name for row in rows] == ["source", "clip", "roundtrip", "base", "tuned", "exported"]
    assert [row.against for row in rows] == [None, 0, 1, 2, 3, 4] and [row.paired for row in rows][3] is False
    assert rows[2].psnr == 29.0 and rows[2].pairs == 1 and rows[4].pairs == 4
    assert rows[2].changes["wavelet_ratio"].size == pytest.approx(-0.02)


def test_rungs_that_were_not_measured_are_left_out() -> None:
    rows, findings = evaluate_ladder(ladder(source=None, clip=None, roundtrip=None, tuned=None))
    assert findings == [] and [(row.rung, row.against) for row in rows] == [(3, None), (5, 3)]


def test_a_softer_group_of_clips_is_a_source_finding() -> None:
    groups = SoftGroup(["a", "b", "c", "d"], 9.0, 4.0, "4 of 8 clips are softer than the rest by 9.0 dB")
    assert named_findings(source=replace(SOURCE, groups=groups)) == [(0, "soft", "alarm", "")]


@pytest.mark.parametrize(
    ("count", "expected"), [(1, []), (3, [(0, "soft", "warning", "")]), (8, [(0, "soft", "alarm", "")])]
)
def test_scaled_up_clips_are_reported_with_their_size(count: int, expected: list[Named]) -> None:
    scaled_up = {str(index): "24x16" for index in range(count)}
    findings = evaluate_ladder(ladder(source=replace(SOURCE, scaled_up=scaled_up)))[1]
    assert [(one.rung, one.defect, one.level, one.field) for one in findings] == expected
    assert all(f"{count} of 8" in one.line and "24x16" in one.line for one in findings)


def test_a_stated_soft_style_is_a_remark_and_no_finding() -> None:
    scaled_up = {str(index): "24x16" for index in range(8)}
    rows, findings = evaluate_ladder(ladder(source=replace(SOURCE, scaled_up=scaled_up, soft_style=True)))
    assert findings == [] and rows[0].verdict == "8 of 8 look scaled up (data.soft_style)"


def test_small_sources_are_a_clip_finding() -> None:
    assert named_findings(clip=replace(CLIP, upscaled={"48x32": 8})) == [(1, "soft", "alarm", "")]


def test_a_loader_that_softens_is_a_clip_finding() -> None:
    soft = dict.fromkeys(METRICS, 0.0) | {"wavelet_ratio": -0.5, "edge_sharpness": -0.2, "blur_effect": -0.2}
    for changed, expected in ((soft, [(1, "soft", "alarm", "")]), (dict.fromkeys(METRICS, 0.0), [])):
        assert named_findings(clip=replace(CLIP, loader={"a": changed, "b": changed})) == expected


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            {"scales": {"1": 18.8, "1.6465": 30.5}, "psnr": {"a": 19.0}},
            (2, "washed_out", "alarm", "vae.scaling_factor"),
        ),
        ({"scales": {"1": 16.0, "0.607": 30.5}, "psnr": {"a": 16.0}}, (2, "saturated", "alarm", "vae.scaling_factor")),
        ({"scales": {"1": 12.0, "0.607": 12.5}, "psnr": {"a": 12.0}}, (2, "artefacts", "alarm", "vae")),
        ({"scales": {"1": 23.0}, "psnr": {"a": 23.0}}, (2, "artefacts", "warning", "vae")),
        ({"non_finite": ["a"], "psnr": {"a": 1.0}}, (2, "non_finite", "alarm", "vae.dtype")),
    ],
)
def test_roundtrip_findings_name_the_faulty_field(facts: dict[str, Any], expected: Named) -> None:
    roundtrip = replace(ROUNDTRIP, metrics={"a": clip()}, identity=replace(IDENTITY, dtype="fp16"), **facts)
    findings = evaluate_ladder(ladder(roundtrip=roundtrip))[1]
    assert [(one.rung, one.defect, one.level, one.field) for one in findings] == [expected]
    assert ("fp16" in findings[0].line) == (expected[1] == "non_finite")


def test_only_the_decoder_in_use_can_be_a_finding() -> None:
    for chosen, expected in ((True, [(2, "artefacts", "alarm", "vae.dtype")]), (False, [])):
        variants = {"fp32, tiled": DecodingVariant(chosen=chosen, psnr=24.7, finite=1.0)}
        assert named_findings(roundtrip=replace(ROUNDTRIP, variants=variants)) == expected


def test_a_setting_that_contradicts_the_family_is_a_base_finding() -> None:
    wrong = FamilyContradiction("scheduler.snr_shift_scale", 3.0, 1.0, "cogvideox-5b")
    (finding,) = evaluate_ladder(ladder(base=replace(BASE, contradictions=[wrong])))[1]
    assert finding.rung == Rung.BASE and finding.field == "scheduler.snr_shift_scale"
    assert "3.0" in finding.line and "cogvideox-5b has 1.0" in finding.line


@pytest.mark.parametrize(
    ("schedule", "found"),
    [
        (ScheduleErrors(3.0, {"1": 0.13, "3": 0.33}), True),
        (ScheduleErrors(1.0, {"1": 0.13, "3": 0.33}), False),
        (ScheduleErrors(3.0, {"1": 0.32, "3": 0.33}), False),  # the weights do not show it clearly
    ],
)
def test_weights_of_another_schedule_are_a_base_finding(schedule: ScheduleErrors, found: bool) -> None:
    expected = [(3, "soft", "alarm", "scheduler.snr_shift_scale")] if found else []
    assert named_findings(base=replace(BASE, schedule=schedule)) == expected


def test_the_tuned_rung_repeats_the_findings_of_the_watch() -> None:
    """The watch separates learning from damage; the ladder does not judge a second time."""
    fallen = prompts(wavelet_ratio=-2.0, edge_sharpness=0.3, blur_effect=0.3)
    finding = WatchFinding("soft", "alarm", "wavelet_ratio", -1.0, "alarm: soft")
    assert named_findings(tuned=replace(TUNED, metrics=fallen, watch=[finding])) == [(4, "soft", "alarm", "")]
    assert named_findings(tuned=replace(TUNED, metrics=fallen, watch=[])) == []


def test_samples_without_a_watch_are_checked_for_non_finite_values() -> None:
    assert named_findings(tuned=replace(TUNED, metrics=prompts(finite=0.5))) == [(4, "non_finite", "alarm", "")]


def test_an_export_with_other_frames_is_an_exported_finding() -> None:
    exported = replace(EXPORTED, metrics=prompts(contrast=0.2), psnr={"p0": 17.0}, failed=True)
    (finding,) = evaluate_ladder(ladder(exported=exported))[1]
    assert (finding.rung, finding.defect, finding.level) == (5, "washed_out", "alarm")
    assert "17.0 dB, allowed 50" in finding.line


def test_an_export_of_an_earlier_step_is_stale_and_never_ok(tmp_path: Path) -> None:
    exported = replace(EXPORTED, step=6)
    rows, findings = evaluate_ladder(ladder(tuned=replace(TUNED, step=8), exported=exported), tmp_path / "my run")
    tuned, row = rows[4], rows[5]
    assert (tuned.step, tuned.stale, tuned.verdict, row.step) == (8, "", "ok", 6) and findings == []
    assert row.verdict == "of step 6, before the present step 8; rung 4 of step 6 is no longer there"
    assert (row.against, row.pairs, row.changes) == (None, 0, {})
    for stage in ("export", "assemble"):
        assert command(stage, {}, run_at(tmp_path / "my run")) in row.renewal
    assert table_cells(row)[1] == "6" and table_cells(row)[-1] == row.verdict
    assert table_cells(row, with_command=True)[-1] == f"{row.verdict}: export again: {row.renewal}"
    assert not any(name.startswith("ladder/rung5") for name in logged_values(rows))


def test_an_export_is_compared_with_the_samples_of_its_own_step(tmp_path: Path) -> None:
    """The newest samples are softer than those of the exported step, which are still in the run."""
    write_samples_record(tmp_path / "samples" / "step-000006", prompts())
    newest = TunedRung(prompts(wavelet_ratio=-2.0), 8, "model")
    rows, _ = evaluate_ladder(ladder(tuned=newest, exported=replace(EXPORTED, step=6)), tmp_path)
    assert rows[5].against == 4 and rows[5].changes["wavelet_ratio"].size == 0.0
    assert rows[5].verdict == "of step 6, before the present step 8"


@pytest.mark.parametrize(
    ("exported", "tuned", "stale"),
    [
        ({"step": 75}, {}, ""),
        ({"step": 75, "line": 1}, {}, ""),
        ({"step": 80}, {}, "of step 80, after the present step 75"),
        ({"step": 75, "line": 1}, {"line": 2}, "of step 75 of line 1, before the present line 2"),
        ({"step": 75, "line": 2}, {"line": 2}, ""),
    ],
)
def test_the_exported_rung_belongs_to_a_step_and_a_line(
    exported: dict[str, Any], tuned: dict[str, Any], stale: str
) -> None:
    rows, _ = evaluate_ladder(ladder(tuned=replace(TUNED, **tuned), exported=replace(EXPORTED, **exported)))
    assert rows[5].stale == stale and (rows[5].verdict == "ok") == (not stale)


def test_a_failed_export_of_an_earlier_step_stays_a_finding() -> None:
    exported = replace(EXPORTED, step=6, failed=True, psnr={"p0": 12.0})
    rows, (finding,) = evaluate_ladder(ladder(exported=exported))
    assert finding.rung == 5 and finding.line.startswith("step 6: the exported folder gives other frames")
    assert rows[5].verdict.startswith("of step 6, before the present step 75") and "alarm: artefacts" in rows[5].verdict


def test_a_renewal_repeats_the_recorded_commands_without_a_fixed_source(tmp_path: Path) -> None:
    run = [override("run.root", tmp_path.parent), f"run.name={tmp_path.name}"]
    recorded = (
        "python -m cogflow stage=export model=tiny 'run.root=a b' run.name=run stage.source=checkpoints/step-000006"
    )
    write_stage_command(tmp_path, "export", recorded)
    write_stage_command(tmp_path, "assemble", "pytest tests")
    rows, _ = evaluate_ladder(ladder(exported=replace(EXPORTED, step=6)), tmp_path)
    assert shlex.split(rows[5].renewal.split(" && ")[0]) == [*PROGRAM, "stage=export", "model=tiny", *run]
    assert rows[5].renewal.split(" && ")[1].startswith("python -m cogflow stage=assemble run.root=")


def test_a_renewal_of_a_flow_exports_and_assembles_without_training(tmp_path: Path) -> None:
    recorded = "python -m cogflow stage=flow debug=quick stage.train.steps=4 stage.assemble.link=copy run.name=run"
    for stage in ("export", "assemble"):
        write_stage_command(tmp_path, stage, recorded)
    rows, _ = evaluate_ladder(ladder(exported=replace(EXPORTED, step=6)), tmp_path)
    run = ["debug=quick", override("run.root", tmp_path.parent), override("run.name", tmp_path.name)]
    assert rows[5].renewal.split(" && ") == [
        command_of(["stage=export", *run]),
        command_of(["stage=assemble", *run, "stage.link=copy"]),
    ]


def test_a_round_trip_of_other_clips_is_stale() -> None:
    assert evaluate_ladder(ladder(clip=replace(CLIP, cache="cache")))[0][2].stale == ""
    row = evaluate_ladder(ladder(clip=replace(CLIP, cache="another")))[0][2]
    assert row.stale == row.verdict == "of other prepared clips than rung 1"


def test_intervals_contain_the_median_and_are_reproducible() -> None:
    ours = {str(index): clip(0.01 * index - 0.5) for index in range(9)}
    theirs = {str(index): clip() for index in range(9)}
    changes, count = compare_pairs(ours, theirs)
    assert count == 9 and changes == compare_pairs(ours, theirs)[0]
    assert changes["wavelet_ratio"].low < changes["wavelet_ratio"].size < changes["wavelet_ratio"].high
    assert changes["wavelet_ratio"].size == pytest.approx(-0.46)
    groups, _ = compare_groups(ours, {f"other {name}": value for name, value in theirs.items()})
    assert groups["wavelet_ratio"].size == pytest.approx(-0.46)
    assert compare_pairs(ours, {"other": clip()}) == ({}, 0)
    assert summarize_changes({"a": {"contrast": 0.1}, "b": {"contrast": 0.3}})["contrast"].size == pytest.approx(0.2)
