"""What contradicts each other in how states and activations are held, and the words for what blocks keep of theirs."""

from __future__ import annotations

from collections.abc import Iterator

from cogflow.config.problems import Problem
from cogflow.config.schema import AnyConfig

KEEPS = ("nothing", "attention", "products", "all")
"""What a recomputed block keeps, the least first."""

SHARDED_KEEPS = KEEPS[:1]
"""The same under ZeRO-3: its linear layers add their biases in place, twice to what was kept, and what it gathers in the backward pass is
not what it gathered before, which PyTorch does not allow where something is kept."""

EVERYTHING = "everything"
"""Kept by a block that is not recomputed."""


def deepspeed_problems(config: AnyConfig) -> Iterator[Problem]:
    deepspeed, stage = config.deepspeed, config.deepspeed.zero_stage
    if deepspeed.offload_optimizer and stage == 0:
        yield Problem(
            "deepspeed.offload_optimizer=true: it needs deepspeed.zero_stage 1 to 3, such as deepspeed=zero2_offload.",
            ("deepspeed.offload_optimizer", "deepspeed.zero_stage"),
        )
    if deepspeed.offload_parameters and stage != 3:
        yield Problem(
            f"deepspeed.offload_parameters=true: it needs deepspeed.zero_stage=3, not {stage}.",
            ("deepspeed.offload_parameters", "deepspeed.zero_stage"),
        )
    if stage == 3 and deepspeed.checkpoint_keep not in ("auto", *SHARDED_KEEPS):
        yield Problem(
            f"deepspeed.checkpoint_keep={deepspeed.checkpoint_keep}: with deepspeed.zero_stage=3 recomputed blocks keep nothing; it should "
            "be auto or nothing.",
            ("deepspeed.checkpoint_keep", "deepspeed.zero_stage"),
        )
