"""Evaluate the ladder: compare each rung with the one before it, and name the defects that each rung shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

from cogflow.ladder.ladder_record import RungRecord, rung_record
from cogflow.ladder.rung import Rung
from cogflow.ladder.rung_comparison import (
    MetricsByName,
    blur_z,
    compare_groups,
    compare_pairs,
    summarize_changes,
)
from cogflow.ladder.schedule_probe import best_shift
from cogflow.ladder.stale_rungs import Partner, find_partner, renewal_command, stale_reason
from cogflow.records.ladder_records import (
    BaseRung,
    ChangeInterval,
    ClipRung,
    ExportedRung,
    LadderFinding,
    LadderRecord,
    LadderRow,
    MetricsByClip,
    RoundtripRung,
    SourceRung,
    TunedRung,
)
from cogflow.sharpness.defects import is_black, is_finite
from cogflow.sharpness.verdict import compare

MANY, MOST = 0.25, 0.5
"""Shares of the clips that are worth a warning, and an alarm."""
LOADER_BLUR_Z = -2.0
"""Blur (noise deviations of a pair) of the loader's frames against an independent resampling of the same frames: an
alarm below. Drawn clips, bicubic against Lanczos: -0.6. A loader that resizes by way of two thirds of the size is far
below."""
LOST_PSNR, POOR_PSNR = 20.0, 24.0
"""dB of the median round trip: alarm and warning below. The shipped tiny VAE gives 29 (26 to 31 over clips) at the
right scale, 14 to 20 at a wrong one; a good VAE gives more than the tiny one, so the limits are set below it."""
SCALE_GAIN = 2.0
"""dB by which the round trip gains when latents are decoded at another scale. The tiny VAE loses 6 dB at 0.8 times the
right scale, and gains 12 when latents at 0.607 or 1.6465 times it are corrected."""
DECODER_PSNR = 40.0
"""dB of the chosen precision and tiling against fp32 without tiles: an alarm below. bf16 gives 57, fp16 76 on the tiny
VAE; rounding to 8 bits gives 59."""
NEEDS_METRICS = (Rung.CLIP, Rung.ROUNDTRIP, Rung.TUNED, Rung.EXPORTED)


def evaluate_ladder(ladder: LadderRecord, run: Path | None = None) -> tuple[list[LadderRow], list[LadderFinding]]:
    """Return the table and the findings of all rungs that were measured.

    ``run``: the run's folder, which has the samples of earlier steps and the commands that renew stale rungs.
    """
    rows, findings = [], []
    for rung in Rung:
        record = rung_record(ladder, rung)
        if record is None or (rung in NEEDS_METRICS and not record.metrics):
            continue
        partner = find_partner(ladder, rung, run)
        here = list(_rung_findings(ladder, record, partner.metrics))
        row = _row(rung, record, partner, here)
        if stale := stale_reason(ladder, rung):
            row = _marked_stale(row, stale, partner, renewal_command(rung, run))
        rows.append(row)
        findings += here
    return rows, findings


def _rung_findings(ladder: LadderRecord, record: RungRecord, reference: MetricsByName) -> Iterator[LadderFinding]:
    match record:
        case SourceRung():
            return _source_findings(record)
        case ClipRung():
            return _clip_findings(record)
        case RoundtripRung():
            return _roundtrip_findings(record)
        case BaseRung():
            return _base_findings(record, ladder.rungs.roundtrip)
        case TunedRung():
            return _tuned_findings(record)
        case ExportedRung():
            return _exported_findings(record, reference)


def _row(rung: Rung, record: RungRecord, partner: Partner, findings: list[LadderFinding]) -> LadderRow:
    changes: dict[str, ChangeInterval] = {}
    pairs = 0
    if isinstance(record, ClipRung) and record.loader:
        # The file's size against the clip's size says little: the loader is compared with an independent resampling of
        # the same frames.
        changes, pairs = summarize_changes(record.loader), len(record.loader)
    elif partner.rung is not None:
        compare_rungs = compare_groups if rung is Rung.BASE else compare_pairs
        changes, pairs = compare_rungs(record.metrics, partner.metrics)
    clips = record.clips_in_all if isinstance(record, SourceRung | ClipRung) else 0
    psnr = record.psnr if isinstance(record, RoundtripRung | ExportedRung) else {}
    found = "; ".join(f"{one.level}: {one.defect.replace('_', ' ')}" for one in findings)
    return LadderRow(
        rung=rung,
        name=rung.title,
        count=clips or len(record.metrics),
        against=partner.rung,
        paired=rung is not Rung.BASE,
        pairs=pairs,
        changes=changes,
        psnr=_median(psnr),
        verdict=found or partner.missing or _remark(record),
        step=record.step if isinstance(record, BaseRung | TunedRung | ExportedRung) else None,
        line=record.line if isinstance(record, TunedRung | ExportedRung) else None,
    )


def _marked_stale(row: LadderRow, stale: str, partner: Partner, renewal: str) -> LadderRow:
    """Return ``row`` with a verdict that says why it is stale; "ok" is no verdict on another step."""
    found = [row.verdict] if row.verdict not in ("ok", partner.missing) else []
    verdict = "; ".join([stale, *([partner.missing] if partner.missing else []), *found])
    return replace(row, stale=stale, verdict=verdict, renewal=renewal)


def _source_findings(record: SourceRung) -> Iterator[LadderFinding]:
    share = len(record.scaled_up) / record.measured if record.measured else 0.0
    if share >= MANY and not record.soft_style:
        sizes = list(record.scaled_up.values())
        usual = max(set(sizes), key=sizes.count)
        line = (
            f"{len(record.scaled_up)} of {record.measured} clips hold no more detail than a smaller picture: "
            f"they look scaled up, from about {usual} (if they are soft on purpose, prepare with data.soft_style=true)"
        )
        yield LadderFinding(Rung.SOURCE, "soft", "alarm" if share >= MOST else "warning", line, "reach", share)
    if (group := record.groups) is not None:
        line = f"{group.line} (such as {', '.join(group.soft[:3])})"
        yield LadderFinding(Rung.SOURCE, "soft", "alarm", line, "detail", -group.gap)


def _clip_findings(record: ClipRung) -> Iterator[LadderFinding]:
    total = sum(record.upscaled.values())
    if record.clips_in_all and total:
        share = total / record.clips_in_all
        sizes = ", ".join(f"{count} of {size}" for size, count in list(record.upscaled.items())[:3])
        line = f"{total} of {record.clips_in_all} clips are smaller than {record.size} and scaled up: {sizes}"
        yield LadderFinding(Rung.CLIP, "soft", "alarm" if share >= MOST else "warning", line, "size", share)
    if record.loader:
        changes = summarize_changes(record.loader)
        if blur_z(changes) < LOADER_BLUR_Z:
            line = (
                f"the loader softens: blur {changes['blur']} against an independent resampling of the frames of "
                f"{len(record.loader)} clips"
            )
            yield LadderFinding(Rung.CLIP, "soft", "alarm", line, "blur", changes["blur"].size)


def _roundtrip_findings(record: RoundtripRung) -> Iterator[LadderFinding]:
    if record.non_finite:
        dtype = record.identity.dtype
        line = f"the VAE gives non-finite values in {dtype} on {len(record.non_finite)} of {len(record.metrics)} clips"
        hint = "; fp16 overflows where bf16 and fp32 do not: set sampling.vae_dtype" if dtype == "fp16" else ""
        yield LadderFinding(Rung.ROUNDTRIP, "non_finite", "alarm", line + hint, "finite", field="vae.dtype")
        return
    if (finding := _wrong_scale(record) or _poor_psnr(record)) is not None:
        yield finding
    yield from _decoder_findings(record)


def _wrong_scale(record: RoundtripRung) -> LadderFinding | None:
    """Return a finding where clips come back better when their latents are scaled by another factor than 1."""
    scales = {float(factor): psnr for factor, psnr in record.scales.items() if psnr is not None}
    best = max(scales, key=lambda factor: scales[factor], default=1.0)
    if not scales or scales[best] - scales[1.0] <= SCALE_GAIN:
        return None
    wrong = 1 / best
    line = (
        f"latents are about {wrong:.2f} times what the VAE decodes: clips come back with "
        f"{scales[best]:.1f} dB at {best:g} times their scale, "
        f"{scales[1.0]:.1f} dB as they are; check the scaling factor"
    )
    # Too small, they lose contrast; too large, tones and colours run to the ends of the range.
    defect = "washed_out" if wrong < 1 else "saturated"
    return LadderFinding(Rung.ROUNDTRIP, defect, "alarm", line, "contrast", wrong, "vae.scaling_factor")


def _poor_psnr(record: RoundtripRung) -> LadderFinding | None:
    psnr = _median(record.psnr)
    if psnr is None or psnr >= POOR_PSNR:
        return None
    line = (
        f"the VAE does not reconstruct the clips: {psnr:.1f} dB; "
        "its weights are wrong, or the latents are another VAE's"
    )
    level = "alarm" if psnr < LOST_PSNR else "warning"
    return LadderFinding(Rung.ROUNDTRIP, "artefacts", level, line, "psnr", psnr, "vae")


def _decoder_findings(record: RoundtripRung) -> Iterator[LadderFinding]:
    """Yield a finding where the chosen precision or tiling of the VAE damages the frames."""
    for name, trial in record.variants.items():
        if not trial.chosen or trial.psnr is None or trial.psnr >= DECODER_PSNR:
            continue
        finite = trial.finite is None or trial.finite >= 1
        result = f"{trial.psnr:.1f} dB against fp32 without tiles" if finite else "non-finite values"
        defect = "artefacts" if finite else "non_finite"
        line = f"decoding in {name} gives {result}"
        yield LadderFinding(Rung.ROUNDTRIP, defect, "alarm", line, "psnr", trial.psnr, "vae.dtype")


def _base_findings(record: BaseRung, roundtrip: RoundtripRung | None) -> Iterator[LadderFinding]:
    for one in record.contradictions:
        line = f"{one.field} is {one.value}; {one.family} has {one.expected}"
        defect = "washed_out" if one.field.endswith("scaling_factor") else "soft"
        yield LadderFinding(Rung.BASE, defect, "alarm", line, field=one.field)
    yield from _schedule_findings(record)
    yield from _absolute_findings(Rung.BASE, record.metrics)
    if record.metrics and roundtrip is not None and roundtrip.metrics:
        # Clips get names that no sample has, so that they are compared as groups.
        clips = {f"clip:{name}": metrics for name, metrics in roundtrip.metrics.items()}
        for finding in compare(record.metrics, clips).findings:
            if finding.defect == "soft" and finding.level == "alarm":
                line = f"samples before the first step are soft: {finding.line()}"
                yield LadderFinding(Rung.BASE, "soft", "alarm", line, "blur", finding.size)


def _schedule_findings(record: BaseRung) -> Iterator[LadderFinding]:
    """Yield a finding where the weights clearly denoise better under another SNR shift than the configured one."""
    if record.schedule is None:
        return
    own = record.schedule.configured
    errors = {float(shift): error for shift, error in record.schedule.errors.items()}
    best = best_shift(errors)
    if own not in errors or best is None or best == own:
        return
    line = (
        f"the weights denoise better under snr_shift_scale {best:g} (error {errors[best]:.4f}) "
        f"than under the scheduler's {own:g} ({errors[own]:.4f}): they were trained under {best:g}"
    )
    size = errors[best] / errors[own] - 1
    yield LadderFinding(Rung.BASE, "soft", "alarm", line, "error", size, "scheduler.snr_shift_scale")


def _tuned_findings(record: TunedRung) -> Iterator[LadderFinding]:
    """Yield the findings of the watch, which separates learning from damage; without a watch, those that need no
    partner.
    """
    if record.watch is None:
        yield from _absolute_findings(Rung.TUNED, record.metrics)
        return
    for one in record.watch:
        line = f"step {record.step}: {one.line}"
        yield LadderFinding(Rung.TUNED, one.defect, one.level, line, one.metric, one.size)


def _exported_findings(record: ExportedRung, reference: MetricsByName) -> Iterator[LadderFinding]:
    if not record.failed:
        return
    shared: MetricsByClip = {name: dict(reference[name]) for name in record.metrics if name in reference}
    ours = {name: record.metrics[name] for name in shared}
    findings = compare(ours, shared).findings if shared else []
    lead = max(findings, key=lambda one: abs(one.z), default=None)
    lowest = min((psnr for psnr in record.psnr.values() if psnr is not None), default=0.0)
    how = "; ".join(one.line() for one in findings) or "no metric shows how"
    step = "" if record.step is None else f"step {record.step}: "
    line = f"{step}the exported folder gives other frames: {lowest:.1f} dB, allowed {record.allowed.psnr:.0f}: {how}"
    if lead is None:
        yield LadderFinding(Rung.EXPORTED, "artefacts", "alarm", line, "psnr", lowest)
    else:
        yield LadderFinding(Rung.EXPORTED, lead.defect, "alarm", line, lead.metric, lead.size)


def _absolute_findings(rung: Rung, metrics: MetricsByName) -> Iterator[LadderFinding]:
    """Yield the defects that samples show without a partner."""
    broken = [name for name, one in metrics.items() if not is_finite(one)]
    dark = [name for name, one in metrics.items() if {"brightness", "contrast"} <= set(one) and is_black(one)]
    total = f"of {len(metrics)} {rung.title} samples"
    if broken:
        line = f"{len(broken)} {total} hold non-finite values"
        yield LadderFinding(rung, "non_finite", "alarm", line, "finite")
    if len(dark) > len(metrics) / 2:
        yield LadderFinding(rung, "black", "alarm", f"{len(dark)} {total} are black", "brightness")


def _remark(record: RungRecord) -> str:
    if isinstance(record, SourceRung) and record.scaled_up:
        stated = " (data.soft_style)" if record.soft_style else ""
        return f"{len(record.scaled_up)} of {record.measured} look scaled up{stated}"
    return "ok"


def _median(psnr: dict[str, float]) -> float | None:
    known = [value for value in psnr.values() if value is not None]
    return median(known) if known else None
