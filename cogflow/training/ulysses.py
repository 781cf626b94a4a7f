"""Attention over tokens that are dealt out to several ranks, after DeepSpeed-Ulysses (arXiv:2309.14509): each rank gives its tokens of
the others' heads for the others' tokens of its own heads, attends over all tokens with its heads, and gives the results back.

Softmax attention asks for no order of its keys: positions are applied before, by the rank that has the token.
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

ASKED = "sequence"
"""The name by which the attention processor is given its :class:`Share`."""


@dataclass(frozen=True)
class SequenceShard:
    """This rank's tokens, the ``index``-th of ``group``. ``text``, ``video``: numbers of tokens of all ranks of the group, in its order."""

    group: Any
    index: int
    text: tuple[int, ...]
    video: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.video)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each rank, text and video."""
        return tuple(text + video for text, video in zip(self.text, self.video, strict=True))

    def of_text(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of ``[batch, all text tokens, width]``."""
        return self._of(whole, self.text, 1)

    def of_video(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part of a tensor with all video tokens along ``dim``."""
        return self._of(whole, self.video, dim)

    def _of(self, whole: torch.Tensor, counts: Sequence[int], dim: int) -> torch.Tensor:
        return whole.narrow(dim, [0, *accumulate(counts)][self.index], counts[self.index])


class UlyssesProcessor:
    """The joint attention of text and video, over the ranks that ``sequence`` names; without it ``plain``, diffusers' own, does it.

    Gives (video, text) as diffusers' processor does, of the tokens that came in.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None, sequence: SequenceShard | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        if sequence is None:
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if attention_mask is not None:
            raise ValueError("sequence parallelism attends over all tokens: it takes no mask")
        text, video = encoder_hidden_states.shape[1], hidden_states.shape[1]
        own = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (layer(own).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (_turned(one, text, image_rotary_emb) for one in (query, key))
        whole = heads_for_tokens([query, key, value], sequence)
        attended = scaled_dot_product_attention(*(one.transpose(1, 2) for one in whole))
        merged = tokens_for_heads(attended.transpose(1, 2), sequence).flatten(2)
        merged = attn.to_out[1](attn.to_out[0](merged))
        given, shown = merged.split([text, video], dim=1)
        return shown, given


def heads_for_tokens(own: Sequence[torch.Tensor], share: SequenceShard) -> tuple[torch.Tensor, ...]:
    """Each of ``own`` ``[batch, this rank's tokens, heads, width]`` as ``[batch, all tokens, heads / size, width]``: of this rank's
    heads, the tokens rank by rank. One exchange for all of them; differentiable. Collective in the group."""
    dealt = [one.unflatten(2, (share.size, -1)).permute(2, 1, 0, 3, 4) for one in own]
    rows = torch.stack(dealt, dim=2).flatten(0, 1)  # [rank and token, which, batch, heads / size, width], in one copy
    return tuple(
        one.transpose(0, 1)
        for one in _exchanged(rows, [share.tokens[share.index]] * share.size, share.tokens, share).unbind(1)
    )


def tokens_for_heads(attended: torch.Tensor, share: SequenceShard) -> torch.Tensor:
    """The way back: ``[batch, all tokens, heads / size, width]`` as ``[batch, this rank's tokens, heads, width]``."""
    own = share.tokens[share.index]
    rows = _exchanged(attended.transpose(0, 1), share.tokens, [own] * share.size, share)
    return rows.unflatten(0, (share.size, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)


def gathered(own: torch.Tensor, share: SequenceShard) -> torch.Tensor:
    """``[batch, all video tokens, width]`` of every rank's ``own`` part, the same on every rank of the group.

    Every rank goes on to the same loss; backwards each keeps the gradient of its own part, times the number of ranks, so that the mean
    of the weights' gradients over the ranks is their sum over the parts. Collective in the group.
    """
    whole: torch.Tensor = _Gather.apply(own, share)
    return whole


def _turned(one: torch.Tensor, text: int, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """``[batch, tokens, heads, width]`` with the video's tokens turned to their positions; text has none."""
    turned: Any = apply_rotary_emb(one[:, text:], tables, sequence_dim=1)
    return torch.cat([one[:, :text], turned], dim=1)


def _exchanged(rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], share: SequenceShard) -> torch.Tensor:
    exchanged: torch.Tensor = _Exchange.apply(rows, send, receive, share.group)
    return exchanged


def _all_to_all(rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: Any) -> torch.Tensor:
    """``send[i]`` of ``rows`` go to rank ``i`` of the group, ``receive[i]`` come from it."""
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group)
    return received


class _Exchange(torch.autograd.Function):
    """Rows to other ranks; backwards their gradients come the same way back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: Any) -> torch.Tensor:
        ctx.back = receive, send, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _all_to_all(grads[0], *ctx.back), None, None, None


class _Gather(torch.autograd.Function):
    """See :func:`gathered`. By the same exchange, since parts of unequal length are what it is for."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, share: SequenceShard) -> torch.Tensor:
        ctx.share = share
        rows = own.transpose(0, 1)
        count = len(rows)
        copies = rows.expand(share.size, *rows.shape).flatten(0, 1)
        return _all_to_all(copies, [count] * share.size, share.video, share.group).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.share.of_video(grads[0], dim=1) * ctx.share.size, None
