"""What contradicts each other in how states and activations are held, and the words for what blocks keep of theirs."""

from __future__ import annotations

from collections.abc import Iterator

from cogflow.config.problems import Problem
from cogflow.config.schema import Config

KEEPS = ("nothing", "attention", "products", "all")
"""What a recomputed block keeps, the least first."""

SHARDED_KEEPS = KEEPS[:2]
"""The same under ZeRO-3, whose own linear layers add their biases in place: to what was kept a bias would be added twice, and nothing
would tell."""

EVERYTHING = "everything"
"""Kept by a block that is not recomputed."""


def deepspeed_problems(config: Config) -> Iterator[Problem]:
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
    keep, how = deepspeed.checkpoint_keep, config.speed.compile
    # Gathering weights cannot be compiled together with what decides what is kept.
    compiled = how in ("blocks", "graphs")
    possible = ("auto", *(SHARDED_KEEPS[:1] if compiled else SHARDED_KEEPS))
    if stage == 3 and keep not in possible:
        yield Problem(
            f"deepspeed.checkpoint_keep={keep}: with deepspeed.zero_stage=3{f' and speed.compile={how}' if compiled else ''} it should be "
            f"one of {', '.join(possible)}.",
            ("deepspeed.checkpoint_keep", "speed.compile", "deepspeed.zero_stage"),
        )
