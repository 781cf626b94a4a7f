"""DeepSpeed's update under ZeRO-1 and 2 with fewer passes over the gradients and fewer launches; what it computes stays the same.

DeepSpeed looks at every gradient by itself: for numbers that are not finite, for its norm, each time with several kernels. CogVideoX-5B has
a thousand of them, and a GPU stands still while they are launched: a tenth of a second each step. Here they are looked at together, as
PyTorch's own clipping does it (``torch._foreach_norm``). (Private names: DeepSpeed's version is pinned, and tests hold the results.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def lighten(optimizer: Any, world_size: int) -> None:
    """Have ``optimizer``, a ``DeepSpeedZeroOptimizer`` of stage 1 or 2 whose states are on the device, update as this module says."""
    # A norm that is not finite says the same as a gradient that is not: DeepSpeed leaves the step out for either.
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
        optimizer.average_tensor = lambda *_: None  # of one rank's gradients the average is themselves


@torch.no_grad()
def norm(optimizer: Any, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """L2 norm of this group's gradients over all ranks, fp32 scalar; -1, DeepSpeed's sign, where it is not finite."""
    own = [gradient for gradient in gradients if gradient.numel() and not getattr(gradient, "_zero_padding", False)]
    if own:
        total = torch.stack(torch._foreach_norm(own, 2, dtype=torch.float64)).square().sum().float()
    else:
        total = torch.zeros((), device=optimizer.device)
    dist.all_reduce(total, group=optimizer.dp_process_group)
    found = total.sqrt()
    return torch.where(found.isfinite(), found, -1.0)


def scale_in_kernel(optimizer: Any, total_norm: torch.Tensor) -> None:
    """Have AdamW's kernel divide the gradients by the loss scale and clip them to their norm: no pass of its own over all of them.

    ``total_norm``: that of the gradients with their scale. As DeepSpeed's ``unscale_and_clip_grads`` computes it.
    """
    scale = torch.as_tensor(optimizer.loss_scale, dtype=torch.float32, device=total_norm.device)
    if optimizer.clip_grad > 0:
        scale = scale * ((total_norm / scale + 1e-6) / optimizer.clip_grad).clamp(min=1.0)
    optimizer.optimizer.grad_scale = scale


@torch.no_grad()
def flat(gradients: Sequence[torch.Tensor], size: int, like: torch.Tensor) -> torch.Tensor:
    """One tensor of ``size`` elements in the dtype of ``like``, the masters, without a copy in the gradients' own between."""
    found = torch.empty(size, dtype=like.dtype, device=like.device)
    counts = [gradient.numel() for gradient in gradients]
    *parts, rest = found.split([*counts, size - sum(counts)])
    rest.zero_()  # what fills up the last rank's part
    torch._foreach_copy_(parts, [gradient.reshape(-1) for gradient in gradients])
    return found
