"""The noise schedule that SAT's samplers follow, which is not quite that of diffusers' schedulers.

Written from what ``ZeroSNRDDPMDiscretization``, ``DiscreteDenoiser`` and ``DynamicCFG`` of zai-org/CogVideo compute (folder
sat/sgm/modules/diffusionmodules) and held to values recorded from that code. Three things differ from diffusers (docs/samplers.md):
the visited timesteps are picked before the rescale to zero terminal SNR, the network's output is read with the nearest entry of the
training table, and step counts that do not divide 1000 visit other timesteps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from cogflow.errors import ConfigError, PipelineError
from cogflow.files.record_io import ForeignObject

FEWEST, MOST = 2, 999
"""SAT's rescale divides by zero with one step, and its code has no timesteps for all 1000."""
EXPONENT = 5
EXPECTED = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}
"""What SAT's samplers take for granted, as diffusers' scheduler config says it."""


@dataclass(frozen=True)
class SatSchedule:
    """What happens at each of N steps, in the order of sampling (noise first).

    ``timesteps``: given to the network. ``alphas``: fp32 ``[N + 1]``, sqrt(alpha_bar) before each step and after the last (0 ... 1).
    ``quantized``: fp32 ``[N]``, the sqrt(alpha_bar) with which the network's output is read as x0.
    """

    timesteps: tuple[int, ...]
    alphas: torch.Tensor
    quantized: torch.Tensor

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def guidance(self, index: int, scale: float, dynamic: bool) -> float:
        """The weight of classifier-free guidance at step ``index``.

        The dynamic one oscillates: SAT puts timesteps of 0..999 where a count of steps was meant, and diffusers repeats it.
        """
        if not dynamic:
            return scale
        done = (self.steps - self.timesteps[index]) / self.steps
        return 1 + scale * (1 - math.cos(math.pi * done**EXPONENT)) / 2


def visited_timesteps(steps: int, count: int = 1000) -> list[int]:
    """The ascending timesteps of ``steps`` steps: evenly from ``count - 1`` down towards 0, cut to whole numbers."""
    return [int(t) for t in np.linspace(count - 1, 0, steps, endpoint=False)][::-1]


def alpha_table(
    shift: float, beta_start: float, beta_end: float, timesteps: list[int] | None = None, count: int = 1000
) -> torch.Tensor:
    """fp32 sqrt(alpha_bar) at ascending ``timesteps`` (all by default), rescaled so that the last is 0 and the first unchanged.

    With all timesteps it is the table of training. float64 up to the shifted alpha_bar and fp32 from there, as SAT.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, count, dtype=torch.float64).square()
    alpha_bar = (1.0 - betas).cumprod(0)
    alpha_bar = alpha_bar / (shift + (1.0 - shift) * alpha_bar)
    roots = alpha_bar[timesteps if timesteps is not None else slice(None)].float().sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return (roots - last) * (first / (first - last))


def make_schedule(steps: int, shift: float, beta_start: float = 0.00085, beta_end: float = 0.012) -> SatSchedule:
    """The schedule of ``steps`` steps for a model trained with SNR shift ``shift`` (2B: 3.0, the others: 1.0).

    Raises :class:`ConfigError` for a count that SAT cannot take.
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
    """The schedule of a model whose diffusers scheduler has ``config``.

    Raises :class:`PipelineError` naming everything in it that SAT's samplers cannot follow.
    """
    wrong = [f"{key}={config.get(key)} (SAT: {value})" for key, value in EXPECTED.items() if config.get(key) != value]
    if wrong or config.get("snr_shift_scale") is None:
        listed = ", ".join(wrong) or "snr_shift_scale is missing"
        raise PipelineError(
            f"The scheduler is not one that SAT has: {listed}.", "Choose sampling.sampler=default for it."
        )
    return make_schedule(
        steps, float(config["snr_shift_scale"]), float(config["beta_start"]), float(config["beta_end"])
    )
