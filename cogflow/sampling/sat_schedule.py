"""The noise schedule of SAT's samplers.

It computes what ``ZeroSNRDDPMDiscretization``, ``DiscreteDenoiser`` and ``DynamicCFG`` of zai-org/CogVideo compute
(folder sat/sgm/modules/diffusionmodules); the tests compare it with values recorded from that code. It differs from
the schedules of diffusers in three points (docs/samplers.md): it selects the timesteps before it rescales to zero
terminal SNR, it converts the network's output with the nearest entry of the training table, and for step counts that
do not divide 1000 it uses other timesteps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from cogflow.errors import ConfigError, PipelineError
from cogflow.files.record_io import ForeignObject

FEWEST, MOST = 2, 999
"""Limits of the number of steps.

SAT's rescale divides by zero with one step, and its code has no timesteps for 1000.
"""
EXPONENT = 5
"""Exponent of SAT's dynamic guidance."""
EXPECTED = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}
"""Entries of diffusers' scheduler config that SAT's samplers require."""


@dataclass(frozen=True)
class SatSchedule:
    """The schedule of N steps, in the order of sampling (noise first).

    ``timesteps``: the inputs of the network. ``alphas``: fp32 ``[N + 1]``, sqrt(alpha_bar) before each step and after
    the last (0 ... 1). ``quantized``: fp32 ``[N]``, the sqrt(alpha_bar) that converts the network's output to x0.
    """

    timesteps: tuple[int, ...]
    alphas: torch.Tensor
    quantized: torch.Tensor

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def guidance(self, index: int, scale: float, dynamic: bool) -> float:
        """Return the weight of classifier-free guidance at step ``index``.

        The dynamic weight oscillates: SAT's formula takes timesteps of 0..999 in the place of step numbers, and
        diffusers does the same.
        """
        if not dynamic:
            return scale
        done = (self.steps - self.timesteps[index]) / self.steps
        return 1 + scale * (1 - math.cos(math.pi * done**EXPONENT)) / 2


def visited_timesteps(steps: int, count: int = 1000) -> list[int]:
    """Return the ascending timesteps of ``steps`` steps.

    They are evenly spaced from ``count - 1`` down towards 0, truncated to integers.
    """
    return [int(t) for t in np.linspace(count - 1, 0, steps, endpoint=False)][::-1]


def alpha_table(
    shift: float, beta_start: float, beta_end: float, timesteps: list[int] | None = None, count: int = 1000
) -> torch.Tensor:
    """Return fp32 sqrt(alpha_bar) at ascending ``timesteps`` (all by default).

    They are rescaled so that the last is 0 and the first is unchanged. With all timesteps this is the table of
    training. As in SAT, the computation is float64 up to the shifted alpha_bar and fp32 from there.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, count, dtype=torch.float64).square()
    alpha_bar = (1.0 - betas).cumprod(0)
    alpha_bar = alpha_bar / (shift + (1.0 - shift) * alpha_bar)
    roots = alpha_bar[timesteps if timesteps is not None else slice(None)].float().sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return (roots - last) * (first / (first - last))


def make_schedule(steps: int, shift: float, beta_start: float = 0.00085, beta_end: float = 0.012) -> SatSchedule:
    """Return the schedule of ``steps`` steps for a model trained with SNR shift ``shift`` (2B: 3.0, the others: 1.0).

    Raise :class:`ConfigError` for a number of steps that SAT does not support.
    """
    if not FEWEST <= steps <= MOST:
        raise ConfigError(
            f"SAT's samplers take {FEWEST} to {MOST} steps, not {steps}.",
            "Set sampling.steps, or another sampling.sampler.",
        )
    timesteps = visited_timesteps(steps)
    alphas = alpha_table(shift, beta_start, beta_end, timesteps).flip(0)
    whole = alpha_table(shift, beta_start, beta_end)
    quantized = whole[(alphas[None] - whole[:, None]).abs().argmin(dim=0)]
    return SatSchedule(tuple(timesteps[::-1]), torch.cat([alphas, alphas.new_ones(1)]), quantized)


def schedule_of(config: ForeignObject, steps: int) -> SatSchedule:
    """Return the schedule of a model whose diffusers scheduler has ``config``.

    Raise :class:`PipelineError` that names every entry that SAT's samplers do not support.
    """
    wrong = [f"{key}={config.get(key)} (SAT: {value})" for key, value in EXPECTED.items() if config.get(key) != value]
    if wrong or config.get("snr_shift_scale") is None:
        listed = ", ".join(wrong) or "snr_shift_scale is missing"
        raise PipelineError(f"SAT's samplers do not support this scheduler: {listed}.", "Set sampling.sampler=default.")
    return make_schedule(
        steps, float(config["snr_shift_scale"]), float(config["beta_start"]), float(config["beta_end"])
    )
