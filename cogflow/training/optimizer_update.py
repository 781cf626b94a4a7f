"""Optimizer updates: AdamW that skips a gradient that is not finite, and a faster update for ZeRO-1 and ZeRO-2.

DeepSpeed examines every gradient separately, for numbers that are not finite and for its norm, each time with several
kernels. CogVideoX-5B has a thousand of them, and a GPU idles for a tenth of a second each step while they are launched.
:func:`fuse_zero_update` makes it examine them together, as PyTorch's own clipping does (``torch._foreach_norm``). What
it computes stays the same. (Private names: DeepSpeed's version is pinned, and tests check the results.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist


class GuardedAdamW(torch.optim.AdamW):
    """AdamW for training without ZeRO: clips to the norm ``gradient_clipping`` (0: off), and skips a gradient that is
    not finite.

    It sets ``overflow`` and ``_global_grad_norm``, which DeepSpeed reads after each step. Gradients are already summed
    over the ranks, so every rank decides alike. ``skip_next`` makes it skip the next step.
    """

    def __init__(self, parameters: Any, *, gradient_clipping: float, **arguments: Any) -> None:
        super().__init__(parameters, **arguments)
        self.gradient_clipping = gradient_clipping
        self.overflow = self.skip_next = False
        self._global_grad_norm: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override] # DeepSpeed reads no loss
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


def fuse_zero_update(optimizer: Any, world_size: int) -> None:
    """Replace methods of ``optimizer``, a ``DeepSpeedZeroOptimizer`` of stage 1 or 2 whose states are on the device, by
    faster ones.
    """
    # A norm that is not finite implies a gradient that is not: DeepSpeed skips the step for either.
    optimizer.has_overflow = lambda *_, **__: False
    optimizer.get_grad_norm_direct = lambda gradients, params, norm_type=2: norm(optimizer, gradients)
    optimizer._get_preflattened_grad_partition = lambda group: flat(
        optimizer.averaged_gradients[group],
        int(optimizer.partition_size[group]),
        optimizer.single_partition_of_fp32_groups[group],
    )
    if isinstance(optimizer.optimizer, torch.optim.AdamW) and optimizer.optimizer.defaults["fused"]:
        optimizer.unscale_and_clip_grads = lambda _, total_norm: scale_in_kernel(optimizer, total_norm)
    if world_size == 1:
        optimizer.average_tensor = lambda *_: None  # the average over one rank is the gradient itself


@torch.no_grad()
def norm(optimizer: Any, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm of this group's gradients over all ranks, fp32 scalar; -1, DeepSpeed's sign, where it is not
    finite.
    """
    own = [gradient for gradient in gradients if gradient.numel() and not getattr(gradient, "_zero_padding", False)]
    if own:
        total = torch.stack(torch._foreach_norm(own, 2, dtype=torch.float64)).square().sum().float()
    else:
        total = torch.zeros((), device=optimizer.device)
    dist.all_reduce(total, group=optimizer.dp_process_group)
    root = total.sqrt()
    return torch.where(root.isfinite(), root, -1.0)


def scale_in_kernel(optimizer: Any, total_norm: torch.Tensor) -> None:
    """Make AdamW's kernel divide the gradients by the loss scale and clip them, instead of a separate pass over all of
    them.

    ``total_norm``: that of the gradients with their scale. The factor is that of DeepSpeed's
    ``unscale_and_clip_grads``.
    """
    scale = torch.as_tensor(optimizer.loss_scale, dtype=torch.float32, device=total_norm.device)
    if optimizer.clip_grad > 0:
        scale = scale * ((total_norm / scale + 1e-6) / optimizer.clip_grad).clamp(min=1.0)
    optimizer.optimizer.grad_scale = scale


@torch.no_grad()
def flat(gradients: Sequence[torch.Tensor], size: int, like: torch.Tensor) -> torch.Tensor:
    """Return one tensor of ``size`` elements in the dtype of ``like``, the master weights, without a copy in the
    gradients' own dtype.
    """
    result = torch.empty(size, dtype=like.dtype, device=like.device)
    counts = [gradient.numel() for gradient in gradients]
    *parts, rest = result.split([*counts, size - sum(counts)])
    rest.zero_()  # padding of the last rank's part
    torch._foreach_copy_(parts, [gradient.reshape(-1) for gradient in gradients])
    return result
