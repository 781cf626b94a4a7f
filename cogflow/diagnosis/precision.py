"""Step 5, precision: each component in bf16 and fp16 against fp32 on one input, and how large values get inside: where fp16 would end."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cogflow.diagnosis.finding import DiagnosisFinding, StepResult
from cogflow.models.loading import DTYPES

FP16_END = 65504.0
POOR = 0.1
"""Root mean square of the error over that of the output, from which a precision does not hold what is computed. On the tiny model bf16
gives 0.4 to 0.6 %, fp16 0.04 to 0.1 %."""
LARGEST = 1.5e9  # parameters that are held in fp32 and once more in half on a CPU


@dataclass(frozen=True)
class Probe:
    """``load()`` gives the component in fp32, ``run(model, dtype)`` its output on one input; ``stored``: the dtype of its file."""

    name: str
    parameters: int
    load: Callable[[], Any]
    run: Callable[[Any, torch.dtype], torch.Tensor]
    stored: str | None


@torch.no_grad()
def compare_precision(probes: Sequence[Probe], rung: int, on_cpu: bool) -> StepResult:
    """A finding where the dtype that a component is stored in, and plain diffusers loads it in, does not hold what it computes."""
    findings: list[DiagnosisFinding] = []
    lines: list[str] = []
    facts: dict[str, Any] = {}
    for probe in probes:
        if on_cpu and probe.parameters > LARGEST:
            lines.append(f"{probe.name}: {probe.parameters / 1e9:.1f} billion parameters are not tried on a CPU")
            continue
        found, told = in_halves(probe)
        facts[probe.name] = found
        lines += told
        own = {"float16": "fp16", "bfloat16": "bf16"}.get(probe.stored or "")
        if own in found and (found[own]["finite"] < 1 or found[own]["error"] > POOR):
            kind = "overflow" if found[own]["finite"] < 1 else "precision"
            why = (
                f"It is stored in {own}, and computing in {own} is off by {found[own]['error']:.1%} of fp32's output; "
            )
            why += f"values inside reach {found['largest_inside']:.3g}."
            findings.append(
                DiagnosisFinding("precision", probe.name, kind, "dtype", False, own, "fp32", rung, 0.95, why)
            )
    return StepResult("precision", findings, lines, facts)


def in_halves(probe: Probe) -> tuple[dict[str, Any], list[str]]:
    """Error and share of finite values by precision; and the lines that tell them."""
    model = probe.load()
    with largest_activations(model) as peaks:
        reference = probe.run(model, torch.float32).float()
    where, peak = max(peaks.items(), key=lambda item: item[1], default=("", 0.0))
    found: dict[str, Any] = {"largest_inside": peak, "where": where}
    lines = [f"{probe.name}: values inside reach {peak:.3g} ({where}); fp16 ends at {FP16_END:.0f}"]
    for name in ("bf16", "fp16"):
        half = torch.nn.Module.to(copy.deepcopy(model), DTYPES[name])
        try:
            output = probe.run(half, DTYPES[name]).float()
        except RuntimeError as failure:  # a precision that this device has no kernel for
            lines.append(f"{probe.name} in {name}: {str(failure).splitlines()[0][:120]}")
            continue
        finite = float(output.isfinite().float().mean())
        gap = torch.where(output.isfinite(), output - reference, reference)
        error = math.sqrt(float(gap.square().mean()) / max(1e-12, float(reference.square().mean())))
        found[name] = {"error": round(error, 6), "finite": finite}
        broken = f", {1 - finite:.2%} of the values are no numbers" if finite < 1 else ""
        lines.append(f"{probe.name} in {name}: off by {error:.2%} of fp32's output{broken}")
    return found, lines


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

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()
