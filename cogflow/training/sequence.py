"""Sequence parallelism: consecutive ranks share each batch, every one with its part of the tokens, for clips too long for one GPU.

Outside of attention every layer works on each token by itself, and so on a rank's own tokens; attention exchanges tokens for heads
(:mod:`cogflow.training.ulysses`). Text and video are cut apart, each into parts that differ by one token at most, so that nothing is
padded and nothing need be masked. Weights, their names and the order in which modules run are those of the model as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cogflow.config.parallel import sequence_problems
from cogflow.config.problems import fail
from cogflow.config.schema import AnyConfig
from cogflow.models.loading import model_folder
from cogflow.models.transformer_inputs import read_transformer_config
from cogflow.runtime import ranks
from cogflow.training.ulysses import ASKED, SequenceShard, UlyssesProcessor, gathered

DIFFUSERS_HEADS = 30
"""Attention heads of a transformer whose config.json does not say."""

TEXT, SETTINGS = (1, "encoder_hidden_states"), (4, "attention_kwargs")
"""Place and name of arguments of a block, which diffusers gives by place where activations are recomputed, else by name."""


def check(config: AnyConfig) -> None:
    """Raise :class:`ConfigError` when ``parallel.sequence`` does not divide the ranks, or the attention heads of the model. Cheap."""
    if config.parallel.sequence > 1:
        transformer = read_transformer_config(model_folder(config.model))
        fail(
            list(
                sequence_problems(
                    config, ranks.world_size(), int(transformer.get("num_attention_heads", DIFFUSERS_HEADS))
                )
            )
        )


@dataclass(frozen=True)
class RankPlacement:
    """Where this process stands when ``size`` consecutive ranks share each batch: they are one data rank."""

    size: int = 1

    @property
    def data_rank(self) -> int:
        return ranks.rank() // self.size

    @property
    def data_ranks(self) -> int:
        return ranks.world_size() // self.size

    @property
    def counts(self) -> bool:
        """Whether this rank's figures of its batch enter sums over all ranks: the others of its group have the same."""
        return ranks.rank() % self.size == 0

    def arguments(self) -> dict[str, Any]:
        """What the forward pass of a transformer that went through :func:`split` takes beside its inputs, on every rank of a group, to run
        on this rank's tokens. Without them it runs by itself, whatever the other ranks do: so it samples."""
        return {"attention_kwargs": {ASKED: True}} if self.size > 1 else {}


def split(transformer: Any, size: int) -> None:
    """Have forward passes with :meth:`Place.arguments` run on this rank's tokens, one of ``size``; nothing for 1. Collective.

    The prediction comes whole, on every rank of the group, and so does its loss. Each rank's gradients are its tokens' part of the
    group's, times ``size``: their mean over all ranks, as DeepSpeed takes it, is the gradient of the mean loss of all batches.
    """
    if size > 1:
        Hooks(transformer, ranks.consecutive_group(size), ranks.rank() % size, size)


class Hooks:
    """Where the tokens are cut and meet again: behind the patch embedding, which needs whole frames, and behind the output layer."""

    def __init__(self, transformer: Any, group: Any, index: int, size: int) -> None:
        self.group, self.index, self.size = group, index, size
        self.share: SequenceShard | None = None
        """Of the forward pass that goes on. Recomputation comes after it, and finds its share among the block's arguments."""
        for block in transformer.transformer_blocks:
            block.attn1.set_processor(UlyssesProcessor(block.attn1.processor))
        transformer.register_forward_pre_hook(self._begin, with_kwargs=True)
        transformer.patch_embed.register_forward_hook(self._cut_video)
        transformer.transformer_blocks[0].register_forward_pre_hook(self._cut_text, with_kwargs=True)
        transformer.proj_out.register_forward_hook(self._gather)
        transformer.register_forward_hook(self._end, always_call=True)

    def _begin(
        self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The share of what the transformer is given, which must come by name."""
        self.share = None
        if not (kwargs.get("attention_kwargs") or {}).get(ASKED):
            return None
        config, frames, (height, width) = (
            transformer.config,
            kwargs["hidden_states"].shape[1],
            kwargs["hidden_states"].shape[-2:],
        )
        video = frames // (config.patch_size_t or 1) * (height // config.patch_size) * (width // config.patch_size)
        text = kwargs["encoder_hidden_states"].shape[1]
        self.share = SequenceShard(self.group, self.index, parts(text, self.size), parts(video, self.size)[::-1])
        tables = kwargs.get("image_rotary_emb")
        if tables is not None:
            tables = tuple(self.share.of_video(table, dim=0) for table in tables)
        return args, {
            **kwargs,
            "image_rotary_emb": tables,
            "attention_kwargs": {**kwargs["attention_kwargs"], ASKED: self.share},
        }

    def _cut_video(self, _: Any, args: tuple[torch.Tensor, ...], embedded: torch.Tensor) -> torch.Tensor | None:
        """All text and this rank's video, ``[batch, tokens, width]``: the transformer itself takes them apart by the text's length."""
        if self.share is None:
            return None
        text, video = embedded.split([sum(self.share.text), sum(self.share.video)], dim=1)
        # A copy, so that the memory of the whole is free.
        return torch.cat([text, self.share.of_video(video, dim=1)], dim=1)

    def _cut_text(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        (place, name), (last, settings) = TEXT, SETTINGS
        share = ((args[last] if len(args) > last else kwargs.get(settings)) or {}).get(ASKED)
        if share is None:
            return None
        if name in kwargs:
            return args, {**kwargs, name: share.of_text(kwargs[name])}
        return (*args[:place], share.of_text(args[place]), *args[place + 1 :]), kwargs

    def _gather(self, _: Any, args: tuple[torch.Tensor, ...], predicted: torch.Tensor) -> torch.Tensor | None:
        return None if self.share is None else gathered(predicted, self.share)

    def _end(self, *_: Any) -> None:
        self.share = None


def parts(tokens: int, size: int) -> tuple[int, ...]:
    """``tokens`` in ``size`` parts, the first of them longer by one where it does not divide."""
    return tuple(tokens // size + (index < tokens % size) for index in range(size))
