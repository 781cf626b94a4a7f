"""What each rung's panels and facts show: the table of the ladder and its findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from cogflow.ladder.comparison import NAMES, Panels, Row, RungFinding, blur_z, changes, of_changes
from cogflow.sharpness.defects import black
from cogflow.sharpness.verdict import compare

MANY, MOST = 0.25, 0.5
"""Shares of the clips that are worth a warning, and an alarm."""
LOADER = -2.0
"""Blur composite (null deviations of a pair) of the loader's frames against an independent resampling of the same frames: an alarm below.
Drawn clips, bicubic against Lanczos: -0.6. A loader that goes by way of a picture of two thirds the size is far below."""
LOST, POOR = 20.0, 24.0
"""dB of the median round trip: the VAE does not give the clips back (alarm), or badly (warning). The shipped tiny VAE gives 29 (26 to 31
over clips) at the right scale, 14 to 20 at a wrong one; a good VAE gives more than the tiny one, so reason sets these below it."""
SCALED = 2.0
"""dB by which the round trip gains when latents are decoded at another scale. The tiny VAE loses 6 dB at 0.8 times the right scale, and
gains 12 when latents at 0.607 or 1.6465 times it are set right."""
VARIANT = 40.0
"""dB of the chosen precision or tiling against fp32 without tiles. bf16 gives 57, fp16 76 on the tiny VAE; 8 bits hold 59."""
SHIFT = 0.05
"""Share by which the denoising error falls under the other schedule: the weights were trained under that one. The tiny model, trained
under 1.0, has 0.135 there and 0.332 under 3.0."""


def work_out(ladder: Mapping[str, Any]) -> tuple[list[Row], list[RungFinding]]:
    """``ladder``: what ladder.json holds (``rungs`` with ``panels`` and ``facts``, ``variants``). Missing rungs are left out."""
    rungs = {int(name): rung for name, rung in ladder.get("rungs", {}).items()}
    rows, findings = [], []
    for number in sorted(rungs):
        facts, panels = rungs[number]["facts"], rungs[number]["panels"]
        if not panels and number in (1, 2, 4, 5):
            continue
        against, reference = _partner(number, rungs)
        found, pairs = changes(panels, reference, number != 3) if against is not None else ({}, 0)
        if number == 1 and facts.get("loader"):
            # Own size against the clip's size says little: the loader is held against an independent resampling of the same frames.
            found, pairs = of_changes(facts["loader"]), len(facts["loader"])
        here = list(_JUDGES[number](rungs, ladder.get("variants", {})))
        psnrs = [value for value in (facts.get("psnr") or {}).values() if value is not None]
        rows.append(
            Row(
                number, int(facts.get("clips_in_all") or len(panels)), against, number != 3, pairs, found, median(psnrs) if psnrs else None,
                "; ".join(f"{one.level}: {one.kind.replace('_', ' ')}" for one in here) or _remark(number, facts),
            )
        )  # fmt: skip
        findings += here
    return rows, findings


def _partner(number: int, rungs: Mapping[int, Any]) -> tuple[int | None, Panels]:
    """The rung to hold ``number`` against. Rung 2 carries its own clips' panels of rung 1."""
    if number == 2:
        return 1, rungs[2]["facts"].get("clips") or {}
    if number == 1:
        return (0, rungs[0]["panels"]) if 0 in rungs else (None, {})
    before = number - 1
    if number == 5 and not rungs.get(4, {}).get("panels"):
        before = 3  # exported without a step of training
    if number == 0 or before not in rungs or not rungs[before]["panels"]:
        return None, {}
    return before, rungs[before]["panels"]


def _source(rungs: Mapping[int, Any], _: Any) -> Iterator[RungFinding]:
    facts = rungs[0]["facts"]
    count, scaled = facts.get("measured") or 0, facts.get("scaled_up") or {}
    if count and len(scaled) / count >= MANY and not facts.get("soft_style"):
        sizes = list(scaled.values())
        usual = max(set(sizes), key=sizes.count)
        level = "alarm" if len(scaled) / count >= MOST else "warning"
        line = (
            f"{len(scaled)} of {count} clips hold no more detail than a smaller picture: they look scaled up, from about {usual} "
            "(if they are soft on purpose, prepare with data.soft_style=true)"
        )
        yield RungFinding(0, "soft", level, line, "reach", len(scaled) / count)
    if groups := facts.get("groups"):
        few = ", ".join(groups["soft"][:3])
        yield RungFinding(0, "soft", "alarm", f"{groups['line']} (such as {few})", "detail", -float(groups["gap"]))


def _clip(rungs: Mapping[int, Any], _: Any) -> Iterator[RungFinding]:
    facts = rungs[1]["facts"]
    count, upscaled = facts.get("clips_in_all") or 0, facts.get("upscaled") or {}
    total = sum(upscaled.values())
    if count and total:
        sizes = ", ".join(f"{number} of {size}" for size, number in list(upscaled.items())[:3])
        level = "alarm" if total / count >= MOST else "warning"
        yield RungFinding(
            1,
            "soft",
            level,
            f"{total} of {count} clips are smaller than {facts['size']} and scaled up: {sizes}",
            "size",
            total / count,
        )
    if facts.get("loader"):
        found = of_changes(facts["loader"])
        if blur_z(found) < LOADER:
            line = f"the loader softens: blur {found['blur']} against an independent resampling of the frames of {len(facts['loader'])} clips"
            yield RungFinding(1, "soft", "alarm", line, "blur", found["blur"].size)


def _roundtrip(rungs: Mapping[int, Any], variants: Mapping[str, Any]) -> Iterator[RungFinding]:
    facts = rungs[2]["facts"]
    identity = facts.get("identity") or {}
    if broken := facts.get("non_finite"):
        dtype = identity.get("dtype", "")
        line = (
            f"the VAE gives values that are no numbers in {dtype} on {len(broken)} of {len(rungs[2]['panels'])} clips"
        )
        hint = "; fp16 overflows where bf16 and fp32 do not: set sampling.vae_dtype" if dtype == "fp16" else ""
        yield RungFinding(2, "non_finite", "alarm", line + hint, "finite", field="vae.dtype")
        return
    scales = {float(factor): value for factor, value in (facts.get("scales") or {}).items() if value is not None}
    best = max(scales, key=lambda factor: scales[factor], default=1.0)
    if scales and scales[best] - scales[1.0] > SCALED:
        wrong, given = (
            1 / best,
            f"{scales[best]:.1f} dB at {best:g} times their scale, {scales[1.0]:.1f} dB as they are",
        )
        line = f"latents are about {wrong:.2f} times what the VAE decodes: clips come back with {given}; check the scaling factor"
        # Too small, they lose contrast; too large, tones and colours run to the ends.
        yield RungFinding(
            2, "washed_out" if wrong < 1 else "saturated", "alarm", line, "contrast", wrong, "vae.scaling_factor"
        )
    else:
        psnr = median(value for value in facts["psnr"].values() if value is not None)
        if psnr < POOR:
            level = "alarm" if psnr < LOST else "warning"
            line = f"the VAE does not give the clips back: {psnr:.1f} dB; its weights, or latents that are not its own"
            yield RungFinding(2, "artefacts", level, line, "psnr", psnr, "vae")
    for name, one in (variants.get("2") or {}).items():
        if one.get("chosen") and one.get("psnr") is not None and one["psnr"] < VARIANT:
            what = (
                "values that are no numbers"
                if one.get("finite", 1) < 1
                else f"{one['psnr']:.1f} dB against fp32 without tiles"
            )
            kind = "non_finite" if one.get("finite", 1) < 1 else "artefacts"
            yield RungFinding(2, kind, "alarm", f"decoding in {name} gives {what}", "psnr", one["psnr"], "vae.dtype")


def _base(rungs: Mapping[int, Any], _: Any) -> Iterator[RungFinding]:
    facts, panels = rungs[3]["facts"], rungs[3]["panels"]
    for one in facts.get("contradictions") or []:
        line = f"{one['field']} is {one['value']}; {one['family']} has {one['expected']}"
        kind = "washed_out" if one["field"].endswith("scaling_factor") else "soft"
        yield RungFinding(3, kind, "alarm", line, field=one["field"])
    schedule = facts.get("schedule") or {}
    errors = {float(shift): value for shift, value in (schedule.get("errors") or {}).items()}
    own = schedule.get("configured")
    if own is not None and own in errors:
        best = min(errors, key=lambda shift: errors[shift])
        if errors[best] < (1 - SHIFT) * errors[own]:
            line = (
                f"the weights denoise better under snr_shift_scale {best:g} (error {errors[best]:.4f}) than under the scheduler's {own:g} "
                f"({errors[own]:.4f}): they were trained under the other"
            )
            yield RungFinding(
                3, "soft", "alarm", line, "error", errors[best] / errors[own] - 1, "scheduler.snr_shift_scale"
            )
    if panels:
        yield from _absolute(3, panels)
        if 2 in rungs and rungs[2]["panels"]:
            for finding in compare(_plain(panels), _plain(_renamed(rungs[2]["panels"]))).findings:
                if finding.kind == "soft" and finding.level == "alarm":
                    yield RungFinding(
                        3,
                        "soft",
                        "alarm",
                        f"samples before the first step are soft: {finding.line()}",
                        "blur",
                        finding.size,
                    )


def _tuned(rungs: Mapping[int, Any], _: Any) -> Iterator[RungFinding]:
    """What the watch says, which knows learning from damage; without one, what needs no partner."""
    facts = rungs[4]["facts"]
    if (found := facts.get("watch")) is None:
        yield from _absolute(4, rungs[4]["panels"])
        return
    for one in found:
        yield RungFinding(
            4, one["kind"], one["level"], f"step {facts.get('step')}: {one['line']}", one["channel"], one["size"]
        )


def _exported(rungs: Mapping[int, Any], _: Any) -> Iterator[RungFinding]:
    facts, panels = rungs[5]["facts"], rungs[5]["panels"]
    psnr, allowed = facts.get("psnr") or {}, facts.get("allowed") or {}
    if not facts.get("failed"):
        return
    partner = _partner(5, rungs)[1]
    shared = {name: partner[name] for name in panels if name in partner}
    kinds = compare(_plain({name: panels[name] for name in shared}), _plain(shared)).findings if shared else []
    lead = max(kinds, key=lambda one: abs(one.z), default=None)
    kind, channel = (lead.kind, lead.channel) if lead else ("artefacts", "psnr")
    how = "; ".join(one.line() for one in kinds) or "no channel of the panel says how"
    line = f"the exported folder gives other frames: {min(psnr.values()):.1f} dB, allowed {allowed.get('psnr', 0):.0f}: {how}"
    yield RungFinding(5, kind, "alarm", line, channel, lead.size if lead else min(psnr.values()))


def _absolute(number: int, panels: Panels) -> Iterator[RungFinding]:
    """What needs no partner."""
    broken = [name for name, panel in panels.items() if panel.get("finite", 1.0) < 1]
    dark = [name for name, panel in panels.items() if {"brightness", "contrast"} <= set(panel) and black(panel)]
    of = f"of {len(panels)} {NAMES[number]} samples"
    if broken:
        yield RungFinding(
            number, "non_finite", "alarm", f"{len(broken)} {of} hold values that are no numbers", "finite"
        )
    if len(dark) > len(panels) / 2:
        yield RungFinding(number, "black", "alarm", f"{len(dark)} {of} are black", "brightness")


def _renamed(panels: Panels) -> Panels:
    """Names that cannot be mistaken for those of samples."""
    return {f"clip:{name}": panel for name, panel in panels.items()}


def _plain(panels: Panels) -> dict[str, dict[str, float]]:
    return {name: dict(panel) for name, panel in panels.items()}


def _remark(number: int, facts: Mapping[str, Any]) -> str:
    if number == 0 and facts.get("scaled_up"):
        stated = " (data.soft_style)" if facts.get("soft_style") else ""
        return f"{len(facts['scaled_up'])} of {facts['measured']} look scaled up{stated}"
    return "ok"


_JUDGES = {0: _source, 1: _clip, 2: _roundtrip, 3: _base, 4: _tuned, 5: _exported}
