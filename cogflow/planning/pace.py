"""Seconds of one optimizer step: computation at an assumed or measured speed, and the communication that it does not hide.

A prediction, as good as its TFLOP/s: ``stage.plan_tflops`` takes those of a measured step (its operations divided by its seconds).
"""

from __future__ import annotations

from dataclasses import dataclass

from cogflow.planning import flops, traffic
from cogflow.planning.gpu_layout import GpuLayout
from cogflow.planning.transformer_size import Tokens, TransformerSize


@dataclass(frozen=True)
class Pace:
    """Seconds of one step. ``waiting``: of communication that computation does not hide."""

    compute: float
    waiting: float

    @property
    def step(self) -> float:
        return self.compute + self.waiting


def pace(shape: TransformerSize, tokens: Tokens, setting: GpuLayout, tflops: float) -> Pace:
    """Of a step of ``setting`` on GPUs that reach ``tflops`` TFLOP/s."""
    one = flops.step(shape, tokens, setting.kept(shape.layers))
    clips = setting.batch * setting.accumulation / setting.sequence
    # ZeRO-2 reduces in the backward pass of each micro step, ZeRO-0 and 1 in that of the last.
    behind = clips if setting.zero_stage >= 2 else clips / setting.accumulation
    compute, backward = (
        one.total * clips / (tflops * 1e12),
        (one.backward + one.recomputation) * behind / (tflops * 1e12),
    )
    return Pace(
        compute, traffic.exposed(traffic.traffic(shape, tokens, setting), setting, backward=backward, compute=compute)
    )
