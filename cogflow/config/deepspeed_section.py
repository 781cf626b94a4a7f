"""Settings of how training is distributed and computed: ``deepspeed.*``, ``parallel.*`` and ``speed.*``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogflow.config.problems import Problem
from cogflow.config.setting import at_least, one_of, setting, within
from cogflow.config.train_settings import training_of

if TYPE_CHECKING:
    from cogflow.config.config import AnyConfig

KEEPS = ("nothing", "attention", "products", "all")
"""Activations that a recomputed block can keep, fewest first."""

SHARDED_KEEPS = KEEPS[:1]
"""The same under ZeRO-3. Its linear layers add their biases in place, which would change what is kept, and the
parameters it gathers in the backward pass are other tensors than in the forward pass, which PyTorch does not allow
where activations are kept."""

EVERYTHING = "everything"
"""Activations that a block keeps which is not recomputed."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """``deepspeed.*``"""

    zero_stage: int = setting(
        2, help="ZeRO stage: 1 shards the optimizer states, 2 gradients, too, 3 parameters, too.", rule=within(0, 3)
    )
    offload_optimizer: bool = setting(False, help="Keep optimizer states in host memory.")
    offload_parameters: bool = setting(False, help="Keep parameters in host memory. Needs deepspeed.zero_stage=3.")
    reduce_bucket_size: int = setting(
        200_000, help="Elements per reduction of gradients. 5e8 suits large models.", rule=at_least(1)
    )
    allgather_bucket_size: int = setting(
        200_000, help="Elements per gathering of parameters. 5e8 suits large models.", rule=at_least(1)
    )
    overlap_comm: bool = setting(False, help="Reduce gradients during the backward pass.")
    activation_checkpointing: bool = setting(
        False, help="Recompute activations in the backward pass: takes less memory and about a third more time."
    )
    checkpoint_every_block: int = setting(
        1,
        help="Transformer blocks that activation checkpointing recomputes. 1: all, 2: every second, 3: every third, "
        "0: as few as fit into the memory.",
        rule=at_least(0),
    )
    checkpoint_keep: str = setting(
        "auto",
        help="Activations that recomputed blocks keep. products: outputs of all linear layers except the widest. "
        "auto: as much as fits.",
        rule=one_of("auto", *KEEPS),
    )
    reduce_dtype: str = setting(
        "fp32",
        help="Dtype in which gradients are summed over the ranks. model: the model's own, half the traffic with more "
        "rounding.",
        rule=one_of("fp32", "model"),
    )


@dataclass(frozen=True)
class ParallelConfig:
    """``parallel.*``"""

    sequence: int = setting(
        1,
        help="Ranks that share each batch, each with a part of the tokens. For clips too long for one GPU.",
        rule=at_least(1),
    )


@dataclass(frozen=True)
class SpeedConfig:
    """``speed.*``. The choices change the speed, not the results; stage=benchmark stage.what=train measures them."""

    attention: str = setting(
        "auto",
        help="Attention kernel. auto: the fastest available. math is slow and stores all attention scores.",
        rule=one_of("auto", "flash", "cudnn", "efficient", "math"),
    )
    compile: str = setting(
        "auto",
        help="Compilation. blocks: torch.compile, a minute at the start. graphs: CUDA graphs, too. auto: blocks on a "
        "GPU, off on a CPU.",
        rule=one_of("auto", "off", "blocks", "graphs"),
    )
    prefetch: int = setting(2, help="Micro batches that are prefetched into pinned memory.", rule=at_least(1))


def check_deepspeed(config: AnyConfig) -> Iterator[Problem]:
    """Yield contradictions within ``deepspeed.*``."""
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
            f"deepspeed.checkpoint_keep={deepspeed.checkpoint_keep}: with deepspeed.zero_stage=3 recomputed "
            "blocks keep "
            "nothing; it should be auto or nothing.",
            ("deepspeed.checkpoint_keep", "deepspeed.zero_stage"),
        )


SEQUENCE = "parallel.sequence"


def check_parallel(config: AnyConfig) -> Iterator[Problem]:
    """Yield contradictions between ``parallel.*`` and the stage, the number of processes and ``speed.*``.

    Launchers ask for the settings outside of the ranks. The number of ranks is then unknown, and the stage checks it.
    """
    size, training = config.parallel.sequence, training_of(config)
    if training is None:
        if size > 1 and config.stage.name == "benchmark":
            yield Problem(
                f"{SEQUENCE}={size}: stage=benchmark measures ranks that do not share batches; it should be 1.",
                (SEQUENCE,),
            )
        return
    processes = os.environ.get("WORLD_SIZE", "")
    gpus = int(processes) if processes.isdecimal() else 0
    if training.settings.plan and training.settings.plan_gpus:
        gpus = training.settings.plan_gpus
    yield from sequence_problems(config, gpus)
    if size > 1 and config.speed.compile in ("blocks", "graphs"):
        yield Problem(
            f"speed.compile={config.speed.compile}: blocks are not compiled with {SEQUENCE}={size}; it should be "
            "off or auto.",
            ("speed.compile", SEQUENCE),
        )


def sequence_problems(config: AnyConfig, gpus: int, heads: int | None = None) -> Iterator[Problem]:
    """Yield what is wrong with ``parallel.sequence`` on ``gpus`` ranks for a model of ``heads`` attention heads.

    0 ranks and no heads mean that the number is not known.
    """
    size = config.parallel.sequence
    for count, counted in (
        (gpus, f"rank{'s' if gpus != 1 else ''} in all"),
        (heads or 0, f"attention heads of model={config.model.name}"),
    ):
        if count % max(1, size):
            good = ", ".join(str(divisor) for divisor in range(1, count + 1) if count % divisor == 0)
            yield Problem(f"{SEQUENCE}={size}: it should divide the {count} {counted}: one of {good}.", (SEQUENCE,))
