"""AdamW that leaves out a step whose gradient is not finite: for training without ZeRO, whose optimizers do so themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class GuardedAdamW(torch.optim.AdamW):
    """Clips to the norm ``gradient_clipping`` (0: not at all) and steps, or does nothing and says so in ``overflow``.

    DeepSpeed looks at an optimizer's ``overflow`` and ``_global_grad_norm`` after each step. Gradients are those of all ranks by then,
    so that each rank decides alike. ``skip_next`` has the next step do nothing.
    """

    def __init__(self, parameters: Any, *, gradient_clipping: float, **arguments: Any) -> None:
        super().__init__(parameters, **arguments)
        self.gradient_clipping = gradient_clipping
        self.overflow = self.skip_next = False
        self._global_grad_norm: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        parameters = [
            parameter for group in self.param_groups for parameter in group["params"] if parameter.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        self.overflow = self.skip_next or not bool(torch.isfinite(norm))
        self.skip_next = False
        if self.overflow:
            return
        self._global_grad_norm = norm
        if self.gradient_clipping > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clipping, norm)
        super().step(closure)
