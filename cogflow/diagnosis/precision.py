"""Step 5, precision: the VAE in fp32, bf16 and fp16 on the same latents, and how large values get inside: where fp16 would end."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cogflow.diagnosis.finding import Finding, StepResult
from cogflow.diagnosis.side import Side
from cogflow.models.components import DTYPES

FP16_END = 65504.0
POOR = 40.0  # dB of a precision against fp32: bf16 gives 57, fp16 76 on the tiny VAE; 8 bits hold 59
ROOM = 0.25  # of fp16's range, from which a larger clip or another prompt may reach its end


@torch.no_grad()
def compare_precision(candidate: Side, vae: Any, latents: torch.Tensor, stored: str | None) -> StepResult:
    """``vae``: the candidate's, in fp32; ``latents``: of one sample ``[frames, channels, h, w]``, scaled. ``stored``: dtype of its file.

    A finding where the dtype it is stored in, and plain diffusers loads it in, does not hold what it computes.
    """
    scaled = (latents.float().transpose(0, 1)[None] / vae.config.scaling_factor).to(vae.device)
    with largest_activations(vae) as peaks:
        reference = vae.decode(scaled).sample
    where, peak = max(peaks.items(), key=lambda item: item[1], default=("", 0.0))
    lines = [f"vae: values inside reach {peak:.3g} ({where}); fp16 ends at {FP16_END:.0f}"]
    found: dict[str, Any] = {"largest_inside": peak, "where": where}
    for name in ("bf16", "fp16"):
        half = torch.nn.Module.to(copy.deepcopy(vae), DTYPES[name])
        try:
            frames = half.decode(scaled.to(DTYPES[name])).sample.float()
        except RuntimeError as failure:  # a precision that this device has no kernel for
            lines.append(f"vae in {name}: {str(failure).splitlines()[0][:120]}")
            continue
        finite = float(frames.isfinite().float().mean())
        error = float(torch.where(frames.isfinite(), frames - reference, 2.0).square().mean())
        value = 100.0 if error == 0 else min(100.0, -10 * math.log10(error / 4))
        found[name] = {"psnr": round(value, 2), "finite": finite}
        lines.append(
            f"vae in {name}: {value:.1f} dB against fp32" + (f", {1 - finite:.2%} of the values are no numbers" if finite < 1 else "")
        )
    findings = []
    own = {"float16": "fp16", "bfloat16": "bf16"}.get(stored or "")
    if own in found and (found[own]["finite"] < 1 or found[own]["psnr"] < POOR):
        why = (
            f"It is stored in {own}, and decoding in {own} gives {found[own]['psnr']:.1f} dB against fp32: values inside reach {peak:.3g}."
        )
        kind = "overflow" if found[own]["finite"] < 1 else "precision"
        findings.append(Finding("precision", "vae", kind, "dtype", False, own, "fp32", candidate.rung, 0.95, why))
    return StepResult("precision", findings, lines, found)


@contextmanager
def largest_activations(model: torch.nn.Module) -> Iterator[dict[str, float]]:
    """Largest magnitude of each leaf module's output while the block runs."""
    peaks: dict[str, float] = {}

    def hook(name: str) -> Any:
        def look(_module: Any, _given: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                peaks[name] = max(peaks.get(name, 0.0), float(tensor.abs().max()))

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if not list(module.children())]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()
