"""Whether the weights move: a few thousand of them, compared bit for bit. A loss can fall while nothing does ("trains, but nothing moves").

In bf16 a weight of size w takes no step smaller than w / 256: at a learning rate of 1e-5 most single steps leave most weights as they are.
DeepSpeed's fp32 masters add such steps up, so that weights move over many steps; without masters they would be lost. What is compared
are the weights as training uses them, each rank its own part of them under ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

TENSORS = 16
ELEMENTS = 1024  # of each
STUCK = 0.999
"""Share of the sampled weights that did not change between two validations, from which on nothing is being trained."""
STUCK_STEPS = 20


class UpdateCheck:
    """Follows a sample of the trained weights of ``module``; costs some copies of 1024 elements."""

    def __init__(self, module: torch.nn.Module) -> None:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        stride = max(1, len(trained) // TENSORS)
        self._sampled = trained[stride // 2 :: stride][:TENSORS]
        self._before = torch.empty(0)
        self._anchor = self._copy()
        self._anchor_step = 0

    def before(self) -> None:
        """Remember the weights: the next step is looked at."""
        self._before = self._copy()

    def unchanged(self) -> torch.Tensor:
        """Share of the sampled weights that are bit for bit what :meth:`before` saw, fp32 scalar on the device: no host sync."""
        return _same(self._before, self._copy())

    def since_anchor(self, step: int) -> tuple[float, int]:
        """Share that is unchanged since this was asked last, and over how many steps; ``step`` counts finished ones."""
        share, steps = float(_same(self._anchor, self._copy())), step - self._anchor_step
        self.anchor(step)
        return share, steps

    def anchor(self, step: int) -> None:
        self._anchor, self._anchor_step = self._copy(), step

    def _views(self) -> Iterator[torch.Tensor]:
        for parameter in self._sampled:
            # ZeRO-3 keeps this rank's part flat beside a parameter that is empty between its uses.
            flat = getattr(parameter, "ds_tensor", parameter).detach().reshape(-1)
            start = max(0, (flat.numel() - ELEMENTS) // 2)
            yield flat[start : start + ELEMENTS]

    def _copy(self) -> torch.Tensor:
        """All of them in one piece: a launch instead of one each."""
        return torch.cat(list(self._views()))


def _same(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    return (before == now).float().mean() if now.numel() else torch.zeros(())


def stuck_line(step: int, share: float, steps: int) -> str | None:
    """What to say when nothing is being trained; ``None`` when something is."""
    if share < STUCK or steps < STUCK_STEPS:
        return None
    return (
        f"step {step}: {share:.2%} of the sampled weights are bit for bit those of {steps} steps ago: nothing is being trained. Raise "
        "stage.learning_rate, look at train/grad_norm and stage.freeze, and in half precision see that ZeRO keeps fp32 masters."
    )
