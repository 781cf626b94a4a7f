"""Activation recomputation: drop activations of blocks and compute them again in the backward pass.

Some activations of such a block can be kept. Attention takes the most time of a block's operations, and its output
takes the least memory: one copy of the hidden states. A kept output is not computed twice. The results of the linear
layers can be kept, too, except for the feed-forward's first, which is four times as wide. (Selective
checkpointing as in Korthikanti et al., arXiv:2205.05198, by PyTorch's ``create_selective_checkpoint_contexts``.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cogflow.config.deepspeed_section import EVERYTHING, DeepSpeedConfig

ATEN = torch.ops.aten

ATTENTION = (
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_cudnn_attention.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
)
"""Kernels of ``scaled_dot_product_attention``; ``math`` is several operations, and its scores are too large to keep."""


def recompute(
    transformer: Any, deepspeed: DeepSpeedConfig, kept: Mapping[str, int] | None = None, mode: str | None = None
) -> None:
    """Drop the activations of all blocks, of every ``checkpoint_every_block``-th, or of those that ``kept`` names,
    evenly spread.

    ``kept``: number of blocks by what they keep, as a plan decides. Without it the settings of ``deepspeed`` hold,
    where ``auto`` keeps nothing, because only a plan knows the memory there is. ``mode``: that of torch.compile for
    compiled blocks.
    """
    if not deepspeed.activation_checkpointing:
        return
    blocks = list(transformer.transformer_blocks)
    if kept is None:
        every, keep = max(1, deepspeed.checkpoint_every_block), deepspeed.checkpoint_keep
        keeps = [EVERYTHING if index % every else keep for index in range(len(blocks))]
    else:
        keeps = spread(kept)
    runners = {id(block): RUNNERS[keep] for block, keep in zip(blocks, keeps, strict=True)}
    transformer.enable_gradient_checkpointing(
        gradient_checkpointing_func=lambda module, *arguments: runners[id(module)](mode, module, *arguments)
    )


def spread(kept: Mapping[str, int]) -> list[str]:
    """Return what each block keeps, from numbers of blocks by what they keep: the first kind spread evenly among the
    others.
    """
    (first, count), *others = kept.items()
    rest = [keep for keep, number in others for _ in range(number)]
    layers = count + len(rest)
    for index in range(count):
        rest.insert(index * layers // count, first)
    return rest


def _run_plain(_: str | None, module: Any, *arguments: Any) -> Any:
    return module(*arguments)


def _run_recomputed(_: str | None, module: Any, *arguments: Any) -> Any:
    return checkpoint(module.__call__, *arguments, use_reentrant=False)


def _run_selective(contexts: Callable[[], Any], mode: str | None, module: Any, *arguments: Any) -> Any:
    if module._compiled_call_impl is None:
        return checkpoint(module.__call__, *arguments, use_reentrant=False, context_fn=contexts)
    # The compiler decides what is kept, so the checkpoint must be inside of the compiled program.
    return _compiled(mode)(contexts, module, *arguments)


@lru_cache  # not at import: importing the compiler takes a second and a half, whether it is used or not
def _compiled(mode: str | None) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(_checkpointed, mode=mode)
    return compiled


def _checkpointed(contexts: Callable[[], Any], module: Any, *arguments: Any) -> Any:
    return checkpoint(module.forward, *arguments, use_reentrant=False, context_fn=contexts)


def _attention_policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def _products_policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    if operation in (ATEN.addmm.default, ATEN.mm.default):
        weight = arguments[-1]  # [in, out]
        return CheckpointPolicy.PREFER_RECOMPUTE if weight.shape[1] > weight.shape[0] else CheckpointPolicy.MUST_SAVE
    return _attention_policy(context, operation)


def _all_policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    if operation in (ATEN.addmm.default, ATEN.mm.default):
        return CheckpointPolicy.MUST_SAVE
    return _attention_policy(context, operation)


def _attention_contexts() -> Any:
    return create_selective_checkpoint_contexts(_attention_policy)


def _products_contexts() -> Any:
    return create_selective_checkpoint_contexts(_products_policy)


def _all_contexts() -> Any:
    return create_selective_checkpoint_contexts(_all_policy)


RUNNERS: dict[str, Callable[..., Any]] = {
    "auto": _run_recomputed,
    "nothing": _run_recomputed,
    "attention": partial(_run_selective, _attention_contexts),
    "products": partial(_run_selective, _products_contexts),
    "all": partial(_run_selective, _all_contexts),
    EVERYTHING: _run_plain,
}
"""How a block runs, by what it keeps."""
