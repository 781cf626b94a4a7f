"""Floating point operations by formula: two for each multiplication and addition of a matrix product. What is left
out (norms, activations, the loss) is less than a hundredth at the sizes of the family; a test counts the tiny model's
operations beside this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cogflow.training.transformer_size import Tokens, TransformerSize


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of one forward pass of one sample. ``outside``: the linear layers outside of the blocks, part of
    ``linear``; ``inputs``: those of them that read what is no result of weights, so that no gradient flows on from
    them."""

    linear: float
    attention: float
    outside: float
    inputs: float

    @property
    def total(self) -> float:
        return self.linear + self.attention


@dataclass(frozen=True)
class StepFlops:
    """Operations of one training sample: forward, backward (twice that), and once more the blocks whose activations
    are recomputed."""

    forward: float
    backward: float
    recomputation: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recomputation


def forward(shape: TransformerSize, tokens: Tokens) -> ForwardFlops:
    """Return the operations of one sample without guidance."""
    width, patch = shape.width, shape.patch**2 * shape.patch_t
    # Four projections of attention and a feed-forward of four times the width; the modulation is computed once per
    # sample.
    block = 24 * tokens.total * width**2 + 2 * 2 * shape.time_width * 6 * width
    inputs = 2 * (tokens.video * shape.in_channels * patch + tokens.text * shape.text_width) * width
    inputs += 2 * (width * shape.time_width + shape.ofs_width**2)
    outputs = 2 * tokens.video * width * shape.out_channels * patch
    embeddings = 2 * (shape.time_width**2 + shape.ofs_width**2) + 2 * shape.time_width * 2 * width
    outside = inputs + outputs + embeddings
    return ForwardFlops(
        linear=float(shape.layers * block + outside),
        attention=float(shape.layers * 4 * tokens.total**2 * width),
        outside=float(outside),
        inputs=float(inputs),
    )


WIDEST = 1 / 3
"""Share of a block's linear layers that is the first of its feed-forward, the one whose result is not kept with the
other products."""


def step(shape: TransformerSize, tokens: Tokens, kept: Mapping[str, int] | None = None) -> StepFlops:
    """Return the operations of one sample. ``kept``: blocks by what they keep
    (:data:`cogflow.training.gpu_memory.KEPT`); default: all keep everything.

    Flash attention recomputes its scores in the backward pass, too; as everywhere, that is not counted.
    """
    one = forward(shape, tokens)
    blocks = one.linear - one.outside
    twice = {"nothing": blocks + one.attention, "attention": blocks, "products": blocks * WIDEST}
    again = sum(count * twice.get(keep, 0.0) for keep, count in (kept or {}).items())
    return StepFlops(one.total, 2 * one.total - one.inputs, again / shape.layers)
