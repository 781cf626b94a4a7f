"""Blocks whose activations are dropped and computed again in the backward pass, and what of them is kept all the same.

Of a block's operations attention costs most and leaves least: its output is one copy of the hidden states. Kept, it need not be computed
twice; so too the results of the linear layers, all but the feed-forward's first, which is four times as wide as the others. (Selective
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
"""Kernels of ``scaled_dot_product_attention``; ``math`` is no operation of its own, and its scores are too large to be kept."""


def recompute(
    transformer: Any, deepspeed: DeepSpeedConfig, kept: Mapping[str, int] | None = None, mode: str | None = None
) -> None:
    """Drop the activations of all blocks, of every ``checkpoint_every_block``-th, or of those that ``kept`` names, spread evenly.

    ``kept``: blocks by what they keep, as a plan's settings have it; default: what ``deepspeed`` says, whose ``auto`` is nothing here,
    since only a plan knows the memory there is. ``mode``: torch.compile's, of blocks that are compiled.
    """
    if not deepspeed.activation_checkpointing:
        return
    blocks = list(transformer.transformer_blocks)
    if kept is None:
        every, keep = max(1, deepspeed.checkpoint_every_block), deepspeed.checkpoint_keep
        keeps = [EVERYTHING if place % every else keep for place in range(len(blocks))]
    else:
        keeps = spread(kept)
    ways = {id(block): WAYS[keep] for block, keep in zip(blocks, keeps, strict=True)}
    transformer.enable_gradient_checkpointing(
        gradient_checkpointing_func=lambda module, *arguments: ways[id(module)](mode, module, *arguments)
    )


def spread(kept: Mapping[str, int]) -> list[str]:
    """One word a block, from blocks by what they keep: of two kinds the first evenly among the others."""
    (first, count), *others = kept.items()
    rest = [keep for keep, number in others for _ in range(number)]
    layers = count + len(rest)
    for place in range(count):
        rest.insert(place * layers // count, first)
    return rest


def _whole(_: str | None, module: Any, *arguments: Any) -> Any:
    return module(*arguments)


def _again(_: str | None, module: Any, *arguments: Any) -> Any:
    return checkpoint(module.__call__, *arguments, use_reentrant=False)


def _again_but(keeper: Callable[[], Any], mode: str | None, module: Any, *arguments: Any) -> Any:
    if module._compiled_call_impl is None:
        return checkpoint(module.__call__, *arguments, use_reentrant=False, context_fn=keeper)
    # What is kept is settled while the block is compiled, so that the program has to contain the checkpoint, not the other way round.
    return _compiled(mode)(keeper, module, *arguments)


@lru_cache  # not when this is imported: the compiler takes a second and a half to import, whether it is wanted or not
def _compiled(mode: str | None) -> Callable[..., Any]:
    return torch.compile(_keeping, mode=mode)


def _keeping(keeper: Callable[[], Any], module: Any, *arguments: Any) -> Any:
    return checkpoint(module.forward, *arguments, use_reentrant=False, context_fn=keeper)


def _attention(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def _products(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    if operation in (ATEN.addmm.default, ATEN.mm.default):
        weight = arguments[-1]  # [in, out]
        return CheckpointPolicy.PREFER_RECOMPUTE if weight.shape[1] > weight.shape[0] else CheckpointPolicy.MUST_SAVE
    return _attention(context, operation)


def _all(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    if operation in (ATEN.addmm.default, ATEN.mm.default):
        return CheckpointPolicy.MUST_SAVE
    return _attention(context, operation)


def _keep_attention() -> Any:
    return create_selective_checkpoint_contexts(_attention)


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(_products)


def _keep_all() -> Any:
    return create_selective_checkpoint_contexts(_all)


WAYS: dict[str, Callable[..., Any]] = {
    "auto": _again,
    "nothing": _again,
    "attention": partial(_again_but, _keep_attention),
    "products": partial(_again_but, _keep_products),
    "all": partial(_again_but, _keep_all),
    EVERYTHING: _whole,
}
"""How a block is run that keeps so much."""
