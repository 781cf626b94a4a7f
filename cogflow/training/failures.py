"""What libraries raise when a machine gives out, told as what it is: no memory left, or another rank that is gone."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from cogflow.config.config import AnyConfig
from cogflow.config.train_settings import TrainStage
from cogflow.errors import MemoryExhausted, RankLost
from cogflow.models.family import MODEL_SPECS
from cogflow.runtime import ranks
from cogflow.runtime.heartbeat import BEAT_SECONDS, SILENT_BEATS, Watchdog, blocking_ranks

NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory", re.IGNORECASE)
CONNECTION = re.compile(
    r"[Cc]onnection (closed|reset|was|refused)|Broken pipe|[Ss]ocket|Timed out waiting|timeout|NCCL error|remote process exited|"
    r"ProcessGroup|Gloo|gloo|watchdog"
)


@contextlib.contextmanager
def translate_errors(config: AnyConfig, watchdog: Watchdog) -> Iterator[None]:
    """Turn an error of memory into :class:`MemoryExhausted` with what would need less; and see :func:`lost_told`."""
    with translate_lost_ranks(watchdog):
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            text = str(error)
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not NO_MEMORY.search(text):
                raise
            exhausted = MemoryExhausted(
                f"Out of memory: {text.splitlines()[0] if text else type(error).__name__}", less_memory(config)
            )
            exhausted.rank = ranks.rank()
            raise exhausted from error


@contextlib.contextmanager
def translate_lost_ranks(watchdog: Watchdog) -> Iterator[None]:
    """Turn an error of the network between the ranks into :class:`RankLost` that names the rank. All else passes as it is."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if ranks.world_size() == 1 or not CONNECTION.search(text):
            raise
        raise rank_lost(watchdog, text.splitlines()[0]) from error


def rank_lost(watchdog: Watchdog, reason: str) -> RankLost:
    """What to say of a collective that broke: who is gone, and where it stood."""
    here = blocking_ranks(watchdog.others(), "")
    if not any(place.gone for place in here):
        # Another host's processes are known to be gone by their silence only.
        here = watchdog.others(
            wait=SILENT_BEATS * BEAT_SECONDS if len({place.host for place in watchdog.others()}) > 1 else 1.0
        )
    gone = [place for place in here if place.gone]
    named = "; ".join(place.line() for place in gone) or "no rank is known to be gone"
    lost = RankLost(
        f"The ranks lost each other: {named} ({reason}).", "Run the same command again: it goes on from what was saved."
    )
    lost.rank = ranks.rank()
    return lost


def less_memory(config: AnyConfig) -> str:
    """Settings that need less memory, the cheapest first; those that are set already are left out."""
    stage, deepspeed, ways = config.stage, config.deepspeed, []
    if not deepspeed.activation_checkpointing:
        ways.append("deepspeed.activation_checkpointing=true (a third more time)")
    elif deepspeed.checkpoint_every_block != 1:
        ways.append("deepspeed.checkpoint_every_block=1 (recompute all blocks)")
    elif deepspeed.checkpoint_keep != "nothing":
        ways.append("deepspeed.checkpoint_keep=nothing (recompute attention, too)")
    if isinstance(stage, TrainStage):
        if stage.batch_size > 1:
            half = stage.batch_size // 2
            accumulation = stage.gradient_accumulation * stage.batch_size // half
            ways.append(
                f"stage.batch_size={half} stage.gradient_accumulation={accumulation} (the same clips in a step)"
            )
        sequence, family = 2 * config.parallel.sequence, MODEL_SPECS.get(config.model.name)
        if ranks.world_size() % sequence == 0 and family is not None and family.heads % sequence == 0:
            accumulation = 2 * stage.gradient_accumulation
            ways.append(
                f"parallel.sequence={sequence} stage.gradient_accumulation={accumulation} (GPUs share their batches' tokens)"
            )
        if stage.ema_decay and stage.ema_device == "auto":
            ways.append("stage.ema_device=cpu")
    if deepspeed.zero_stage < 2:
        ways.append("deepspeed=zero2")
    elif deepspeed.zero_stage == 2 and ranks.world_size() > 1:
        ways.append("deepspeed=zero3 (weights shared out over the GPUs)")
    if not deepspeed.offload_optimizer:
        ways.append(f"deepspeed=zero{max(2, deepspeed.zero_stage)}_offload (optimizer states in host memory)")
    if not config.sampling.vae_tiling and isinstance(stage, TrainStage) and stage.sample_every:
        ways.append("sampling.vae_tiling=true, when it was a validation")
    ways.append("fewer data.frames, or a smaller data.height and data.width (prepare again)")
    return "What needs less: " + "; ".join(ways) + ". The last checkpoint is whole."
