"""Checks of a training step: loss spikes, skipped updates, and whether weights change at all.

They hold rules and state only. :mod:`cogflow.training.step_monitor` feeds them and reports;
:mod:`cogflow.training.policy` acts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from cogflow.records.training_records import SkippedSteps, SpikeWindow

SPIKE_WINDOW = 128
"""Steps that a value is compared with."""
SPIKE_MIN_STEPS = 32
"""Steps before which nothing is called a spike."""
SPIKE_SIGMAS = 6.0
SPIKE_MIN_DEVIATION = 0.02
"""Least deviation of the logarithm, so that a small rise of a nearly constant loss is no spike."""
MAX_CONSECUTIVE_SKIPS = 20
"""Skipped updates in a row after which training stops."""

SAMPLED_TENSORS = 16
SAMPLED_ELEMENTS = 1024
"""Elements of each sampled tensor."""
UNCHANGED_SHARE = 0.999
"""Share of sampled weights that kept their bits between two checks, from which on nothing is being trained."""
UNCHANGED_STEPS = 20
"""Fewest steps between two checks that allow this conclusion."""


class SpikeDetector:
    """Finds values more than SPIKE_SIGMAS deviations above the mean of the last SPIKE_WINDOW steps.

    Mean and deviation are those of logarithms, because losses and norms spread by factors. A spike does not enter the
    window, unless so many follow each other that the level has changed.
    """

    def __init__(self, state: SpikeWindow | None = None) -> None:
        state = state or SpikeWindow()
        self._values = list(state.values)
        self._above = state.above

    def state_dict(self) -> SpikeWindow:
        return SpikeWindow(list(self._values), self._above)

    def sigmas(self, value: float) -> float:
        """Return by how many deviations ``value`` is above the window's mean; 0 while there are too few steps."""
        if len(self._values) < SPIKE_MIN_STEPS or not math.isfinite(value) or value <= 0:
            return 0.0
        # statistics.pstdev adds fractions exactly, which takes a tenth of a millisecond at every step.
        mean = math.fsum(self._values) / len(self._values)
        deviation = math.sqrt(math.fsum((known - mean) ** 2 for known in self._values) / len(self._values))
        return (math.log(value) - mean) / max(deviation, SPIKE_MIN_DEVIATION)

    def is_spike(self, value: float) -> bool:
        return self.sigmas(value) > SPIKE_SIGMAS

    def update(self, value: float) -> float | None:
        """Add the value of a step to the window; return its deviations when it is a spike."""
        sigmas = self.sigmas(value)
        spike = sigmas > SPIKE_SIGMAS
        self._above = self._above + 1 if spike else 0
        if math.isfinite(value) and value > 0 and (not spike or self._above > SPIKE_WINDOW // 4):
            self._values = [*self._values, math.log(value)][-SPIKE_WINDOW:]
        return sigmas if spike else None


class SkipCounter:
    """Counts skipped updates: in total and in a row."""

    def __init__(self, state: SkippedSteps | None = None) -> None:
        state = state or SkippedSteps()
        self.total = state.total
        self.in_a_row = state.in_a_row

    def state_dict(self) -> SkippedSteps:
        return SkippedSteps(self.total, self.in_a_row)

    def update(self, applied: bool) -> None:
        self.total += not applied
        self.in_a_row = 0 if applied else self.in_a_row + 1

    @property
    def too_many(self) -> bool:
        return self.in_a_row >= MAX_CONSECUTIVE_SKIPS


def not_finite_message(step: int, by_rank: Sequence[Sequence[str]]) -> str:
    """Return a message for step ``step`` (from 1).

    ``by_rank``: names of the clips whose loss was not finite, for each rank.
    """
    found = [f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(by_rank) if names]
    if not found:
        return f"The gradient of step {step} is not finite, but every loss is; the weights are those before the step"
    return f"The loss of step {step} is not finite ({'; '.join(found)}); the weights are those before the step"


class UpdateCheck:
    """Compares a sample of a module's trained weights bit by bit, to find a run whose loss falls while no weight
    changes.

    In bf16 a weight of size w takes no step smaller than w / 256: at a learning rate of 1e-5 most single steps leave
    most weights as they are. DeepSpeed's fp32 master weights add such steps up, so that weights change over many steps;
    without them the steps would be lost. The check reads the weights as training uses them; under ZeRO-3 each rank
    reads its own shard. It copies 16 x 1024 elements.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        stride = max(1, len(trained) // SAMPLED_TENSORS)
        self._sampled = trained[stride // 2 :: stride][:SAMPLED_TENSORS]
        self._before = torch.empty(0)
        self._anchor = self._copy()
        self.anchor_step = 0

    def before_step(self) -> None:
        """Copy the weights before a step that is to be checked."""
        self._before = self._copy()

    def unchanged_by_step(self) -> torch.Tensor:
        """Return the share of sampled weights unchanged since :meth:`before_step`, an fp32 scalar on the device: no
        host sync.
        """
        return _unchanged_share(self._before, self._copy())

    def unchanged_since_anchor(self, step: int) -> tuple[float, int]:
        """Return the share unchanged since the anchor and the number of steps since; ``step`` finished steps are the
        new anchor.
        """
        share, steps = float(_unchanged_share(self._anchor, self._copy())), step - self.anchor_step
        self.set_anchor(step)
        return share, steps

    def set_anchor(self, step: int) -> None:
        """Compare later weights with those after ``step`` steps."""
        self._anchor, self.anchor_step = self._copy(), step

    def _views(self) -> Iterator[torch.Tensor]:
        for parameter in self._sampled:
            # ZeRO-3 keeps this rank's shard flat in ds_tensor; the parameter itself is empty between its uses.
            flat = getattr(parameter, "ds_tensor", parameter).detach().reshape(-1)
            start = max(0, (flat.numel() - SAMPLED_ELEMENTS) // 2)
            yield flat[start : start + SAMPLED_ELEMENTS]

    def _copy(self) -> torch.Tensor:
        """Return all sampled weights in one tensor, copied by one kernel launch."""
        return torch.cat(list(self._views()))


def _unchanged_share(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    return (before == now).float().mean() if now.numel() else torch.zeros(())


def unchanged_message(step: int, share: float, steps: int) -> str | None:
    """Return a message when nothing is being trained, else ``None``."""
    if share < UNCHANGED_SHARE or steps < UNCHANGED_STEPS:
        return None
    return (
        f"step {step}: {share:.2%} of the sampled weights are bit for bit those of {steps} steps ago: nothing is being "
        "trained. Raise "
        "stage.learning_rate, check train/grad_norm and stage.freeze, and in half precision check that ZeRO keeps fp32 "
        "master weights."
    )
