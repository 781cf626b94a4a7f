"""Sequence parallelism: consecutive ranks share each batch and split its tokens, for clips too long for one GPU.

Outside of attention every layer works on each token alone, and so on a rank's own tokens. Attention exchanges tokens
for heads, after DeepSpeed-Ulysses (arXiv:2309.14509): each rank sends its tokens of the other ranks' heads, receives
the other ranks' tokens of its own heads, attends over all tokens with its heads, and sends the results back. Softmax
attention needs no order of its keys: the rank that has a token applies the positions before the exchange.

Text and video are split separately, into parts that differ by one token at most, so nothing is padded and nothing is
masked. Weights, their names and the order in which modules run are those of the plain model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.embeddings import apply_rotary_emb
from torch.nn.functional import scaled_dot_product_attention

from cogflow.config.config import AnyConfig
from cogflow.config.deepspeed_section import sequence_problems
from cogflow.config.problems import fail
from cogflow.models.loading import model_folder
from cogflow.models.transformer_inputs import read_transformer_settings
from cogflow.runtime import ranks

TEXT_ARGUMENT = (1, "encoder_hidden_states")
KWARGS_ARGUMENT = (4, "attention_kwargs")
"""Position and name of arguments of a block. diffusers passes them by position where activations are recomputed, else
by name.
"""

SHARD_ARGUMENT = "sequence"
"""Key of ``attention_kwargs`` that holds the :class:`SequenceShard`; before the transformer's hooks have run it holds
True.
"""


def check(config: AnyConfig) -> None:
    """Raise :class:`ConfigError` when ``parallel.sequence`` does not divide the ranks, or the attention heads of the
    model.
    """
    if config.parallel.sequence > 1:
        transformer = read_transformer_settings(model_folder(config.model))
        fail(list(sequence_problems(config, ranks.world_size(), transformer.num_attention_heads)))


@dataclass(frozen=True)
class RankPlacement:
    """Place of this process when ``size`` consecutive ranks share each batch: these form one data rank."""

    size: int = 1

    @property
    def data_rank(self) -> int:
        return ranks.rank() // self.size

    @property
    def data_ranks(self) -> int:
        return ranks.world_size() // self.size

    @property
    def counts(self) -> bool:
        """True when sums over all ranks include this rank's metrics; the other ranks of its group have the same."""
        return ranks.rank() % self.size == 0

    def forward_arguments(self) -> dict[str, Any]:
        """Return the arguments with which the forward pass of a transformer after :func:`split` runs on this rank's
        tokens.

        All ranks of a group must pass them. Without them the forward pass runs on all tokens and does not communicate,
        as sampling needs.
        """
        return {"attention_kwargs": {SHARD_ARGUMENT: True}} if self.size > 1 else {}


@dataclass(frozen=True)
class SequenceShard:
    """This rank's tokens, the ``index``-th part of ``group``.

    ``text``, ``video``: token counts of all ranks of the group, in its order.
    """

    group: Any
    index: int
    text: tuple[int, ...]
    video: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.video)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token counts of all ranks, text and video together."""
        return tuple(text + video for text, video in zip(self.text, self.video, strict=True))

    def of_text(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of ``[batch, all text tokens, width]``."""
        return self._part(whole, self.text, 1)

    def of_video(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's part of a tensor with all video tokens along ``dim``."""
        return self._part(whole, self.video, dim)

    def _part(self, whole: torch.Tensor, counts: Sequence[int], dim: int) -> torch.Tensor:
        return whole.narrow(dim, [0, *accumulate(counts)][self.index], counts[self.index])


def split(transformer: Any, size: int) -> None:
    """Make forward passes with :meth:`RankPlacement.forward_arguments` run on this rank's tokens; nothing for ``size``
    1. Collective.

    The prediction, and so the loss, is whole on every rank of the group. Each rank's gradients are those of its tokens
    times ``size``: their mean over all ranks, which DeepSpeed computes, is the gradient of the mean loss of all
    batches.
    """
    if size > 1:
        SequenceHooks(transformer, ranks.consecutive_group(size), ranks.rank() % size, size)


class SequenceHooks:
    """Module hooks that split the tokens behind the patch embedding, which needs whole frames, and gather them behind
    the output layer.
    """

    def __init__(self, transformer: Any, group: Any, index: int, size: int) -> None:
        self.group, self.index, self.size = group, index, size
        self.shard: SequenceShard | None = None
        """Shard of the running forward pass.

        Recomputation runs later and finds the shard in the block's arguments.
        """
        for block in transformer.transformer_blocks:
            block.attn1.set_processor(UlyssesProcessor(block.attn1.processor))
        transformer.register_forward_pre_hook(self._begin, with_kwargs=True)
        transformer.patch_embed.register_forward_hook(self._split_video)
        transformer.transformer_blocks[0].register_forward_pre_hook(self._split_text, with_kwargs=True)
        transformer.proj_out.register_forward_hook(self._gather)
        transformer.register_forward_hook(self._end, always_call=True)

    def _begin(
        self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Set the shard of the transformer's inputs, which must be passed by name."""
        self.shard = None
        if not (kwargs.get("attention_kwargs") or {}).get(SHARD_ARGUMENT):
            return None
        config, shape = transformer.config, kwargs["hidden_states"].shape
        frames, height, width = shape[1], shape[-2], shape[-1]
        video = frames // (config.patch_size_t or 1) * (height // config.patch_size) * (width // config.patch_size)
        text = kwargs["encoder_hidden_states"].shape[1]
        self.shard = SequenceShard(
            self.group, self.index, split_counts(text, self.size), split_counts(video, self.size)[::-1]
        )
        tables = kwargs.get("image_rotary_emb")
        if tables is not None:
            tables = tuple(self.shard.of_video(table, dim=0) for table in tables)
        attention = {**kwargs["attention_kwargs"], SHARD_ARGUMENT: self.shard}
        return args, {**kwargs, "image_rotary_emb": tables, "attention_kwargs": attention}

    def _split_video(self, _: Any, args: tuple[torch.Tensor, ...], embedded: torch.Tensor) -> torch.Tensor | None:
        """Return all text and this rank's video, ``[batch, tokens, width]``; the transformer separates them by the
        length of the text.
        """
        if self.shard is None:
            return None
        text, video = embedded.split([sum(self.shard.text), sum(self.shard.video)], dim=1)
        # A copy, so that the memory of the whole is freed.
        return torch.cat([text, self.shard.of_video(video, dim=1)], dim=1)

    def _split_text(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        position, name = TEXT_ARGUMENT
        last, attention = KWARGS_ARGUMENT
        shard = ((args[last] if len(args) > last else kwargs.get(attention)) or {}).get(SHARD_ARGUMENT)
        if shard is None:
            return None
        if name in kwargs:
            return args, {**kwargs, name: shard.of_text(kwargs[name])}
        return (*args[:position], shard.of_text(args[position]), *args[position + 1 :]), kwargs

    def _gather(self, _: Any, args: tuple[torch.Tensor, ...], predicted: torch.Tensor) -> torch.Tensor | None:
        return None if self.shard is None else gathered(predicted, self.shard)

    def _end(self, *_: Any) -> None:
        self.shard = None


class UlyssesProcessor:
    """Joint attention of text and video over the ranks of ``sequence``; without a shard it calls ``plain``, the
    processor of diffusers.

    Returns (video, text) of the tokens that came in, as diffusers' processor does.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        sequence: SequenceShard | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if sequence is None:
            tokens: tuple[torch.Tensor, torch.Tensor] = self.plain(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return tokens
        if attention_mask is not None:
            raise ValueError("sequence parallelism attends over all tokens and takes no mask")
        text, video = encoder_hidden_states.shape[1], hidden_states.shape[1]
        own = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (layer(own).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (_rotate_video(tensor, text, image_rotary_emb) for tensor in (query, key))
        whole = heads_for_tokens([query, key, value], sequence)
        query, key, value = (tensor.transpose(1, 2) for tensor in whole)
        attended = scaled_dot_product_attention(query, key, value)
        merged = tokens_for_heads(attended.transpose(1, 2), sequence).flatten(2)
        merged = attn.to_out[1](attn.to_out[0](merged))
        text_tokens, video_tokens = merged.split([text, video], dim=1)
        return video_tokens, text_tokens


def split_counts(tokens: int, size: int) -> tuple[int, ...]:
    """Return ``tokens`` in ``size`` parts, of which the first are longer by one where ``size`` does not divide
    ``tokens``.
    """
    return tuple(tokens // size + (index < tokens % size) for index in range(size))


def heads_for_tokens(own: Sequence[torch.Tensor], shard: SequenceShard) -> tuple[torch.Tensor, ...]:
    """Return each ``[batch, this rank's tokens, heads, width]`` of ``own`` as ``[batch, all tokens, heads / size,
    width]``.

    The result holds the tokens of this rank's heads, rank by rank. One exchange for all of them; differentiable.
    Collective in the group.
    """
    by_rank = [tensor.unflatten(2, (shard.size, -1)).permute(2, 1, 0, 3, 4) for tensor in own]
    rows = torch.stack(by_rank, dim=2).flatten(0, 1)  # [rank and token, which, batch, heads / size, width], in one copy
    exchanged = _exchanged(rows, [shard.tokens[shard.index]] * shard.size, shard.tokens, shard)
    return tuple(tensor.transpose(0, 1) for tensor in exchanged.unbind(1))


def tokens_for_heads(attended: torch.Tensor, shard: SequenceShard) -> torch.Tensor:
    """Return ``[batch, all tokens, heads / size, width]`` as ``[batch, this rank's tokens, heads, width]``; see
    :func:`heads_for_tokens`.
    """
    own = shard.tokens[shard.index]
    rows = _exchanged(attended.transpose(0, 1), shard.tokens, [own] * shard.size, shard)
    parts: torch.Tensor = rows.unflatten(0, (shard.size, own))
    return parts.permute(2, 1, 0, 3, 4).flatten(2, 3)


def gathered(own: torch.Tensor, shard: SequenceShard) -> torch.Tensor:
    """Return ``[batch, all video tokens, width]`` of the ``own`` parts of all ranks, the same on every rank of the
    group. Collective.

    Every rank computes the same loss from it. Backward, each rank keeps the gradient of its own part times the number
    of ranks, so that the mean of the weights' gradients over the ranks is their sum over the parts.
    """
    whole: torch.Tensor = _Gather.apply(own, shard)  # type: ignore[no-untyped-call]
    return whole


def _rotate_video(tensor: torch.Tensor, text: int, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return ``[batch, tokens, heads, width]`` with rotary positions applied to the video tokens; text tokens have
    none.
    """
    rotated: Any = apply_rotary_emb(tensor[:, text:], tables, sequence_dim=1)
    return torch.cat([tensor[:, :text], rotated], dim=1)


def _exchanged(rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], shard: SequenceShard) -> torch.Tensor:
    exchanged: torch.Tensor = _Exchange.apply(rows, send, receive, shard.group)  # type: ignore[no-untyped-call]
    return exchanged


def _all_to_all(rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: Any) -> torch.Tensor:
    """Send ``send[i]`` of ``rows`` to rank ``i`` of the group and receive ``receive[i]`` rows from it."""
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group)
    return received


class _Exchange(torch.autograd.Function):
    """Sends rows to other ranks; backward, their gradients return the same way."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: Any) -> torch.Tensor:
        ctx.back = receive, send, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _all_to_all(grads[0], *ctx.back), None, None, None


class _Gather(torch.autograd.Function):
    """See :func:`gathered`. It uses the same exchange, which takes parts of unequal length."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, shard: SequenceShard) -> torch.Tensor:
        ctx.shard = shard
        rows = own.transpose(0, 1)
        count = len(rows)
        copies = rows.expand(shard.size, *rows.shape).flatten(0, 1)
        return _all_to_all(copies, [count] * shard.size, shard.video, shard.group).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.shard.of_video(grads[0], dim=1) * ctx.shard.size, None
