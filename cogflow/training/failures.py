"""Translation of library errors: no memory left, or another rank lost; with settings that need less memory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.errors import MemoryExhausted, RankLost
from cogflow.models.family import MODEL_SPECS
from cogflow.runtime import ranks
from cogflow.runtime.heartbeat import Watchdog, blocking_ranks

NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory", re.IGNORECASE)
CONNECTION = re.compile(
    r"[Cc]onnection (closed|reset|was|refused)|Broken pipe|[Ss]ocket|Timed out waiting|timeout|NCCL error|"
    r"remote process exited|ProcessGroup|Gloo|gloo|watchdog"
)


@dataclass(frozen=True)
class MemoryAdvice:
    """Settings that need less memory. ``note``: what they cost or when they help."""

    settings: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.settings} ({self.note})" if self.note else self.settings


@contextlib.contextmanager
def translate_errors(config: Config[TrainStage], watchdog: Watchdog) -> Iterator[None]:
    """Raise :class:`MemoryExhausted` with advice for an error of memory, and :class:`RankLost` for an error of the
    network.
    """
    with translate_lost_ranks(watchdog):
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            text = str(error)
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not NO_MEMORY.search(text):
                raise
            advice = "; ".join(str(item) for item in less_memory(config))
            exhausted = MemoryExhausted(
                f"Out of memory: {text.splitlines()[0] if text else type(error).__name__}",
                f"These need less memory, the cheapest first: {advice}. The last checkpoint is whole.",
            )
            exhausted.rank = ranks.rank()
            raise exhausted from error


@contextlib.contextmanager
def translate_lost_ranks(watchdog: Watchdog) -> Iterator[None]:
    """Raise :class:`RankLost` with the rank's name for an error of the network between ranks.

    Other errors pass unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if ranks.world_size() == 1 or not CONNECTION.search(text):
            raise
        raise rank_lost(watchdog, text.splitlines()[0]) from error


def rank_lost(watchdog: Watchdog, reason: str) -> RankLost:
    """Return the error for a collective that broke: it names the rank that is gone, and its last phase."""
    states = blocking_ranks(watchdog.others(), "")
    if not any(state.gone for state in states):
        # A process on another host is known to be gone by its silence only.
        states = watchdog.watch_others()
    gone = "; ".join(state.line() for state in states if state.gone) or "no rank is known to be gone"
    lost = RankLost(
        f"The ranks lost each other: {gone} ({reason}).",
        "Run the same command again: it resumes from the last checkpoint.",
    )
    lost.rank = ranks.rank()
    return lost


def less_memory(config: Config[TrainStage]) -> list[MemoryAdvice]:
    """Return settings that need less memory, the cheapest first; settings that are in use already are left out."""
    return [*_recomputation(config), *_smaller_batches(config), *_sharding(config), *_smaller_samples(config)]


def _recomputation(config: Config[TrainStage]) -> Iterator[MemoryAdvice]:
    deepspeed = config.deepspeed
    if not deepspeed.activation_checkpointing:
        yield MemoryAdvice("deepspeed.activation_checkpointing=true", "a third more time")
    elif deepspeed.checkpoint_every_block != 1:
        yield MemoryAdvice("deepspeed.checkpoint_every_block=1", "recompute all blocks")
    elif deepspeed.checkpoint_keep != "nothing":
        yield MemoryAdvice("deepspeed.checkpoint_keep=nothing", "recompute attention, too")


def _smaller_batches(config: Config[TrainStage]) -> Iterator[MemoryAdvice]:
    stage = config.stage
    if stage.batch_size > 1:
        half = stage.batch_size // 2
        accumulation = stage.gradient_accumulation * stage.batch_size // half
        yield MemoryAdvice(
            f"stage.batch_size={half} stage.gradient_accumulation={accumulation}", "the same clips in a step"
        )
    sequence, family = 2 * config.parallel.sequence, MODEL_SPECS.get(config.model.name)
    if ranks.world_size() % sequence == 0 and family is not None and family.heads % sequence == 0:
        accumulation = 2 * stage.gradient_accumulation
        yield MemoryAdvice(
            f"parallel.sequence={sequence} stage.gradient_accumulation={accumulation}",
            "GPUs split the tokens of a batch",
        )
    if stage.ema_decay and stage.ema_device == "auto":
        yield MemoryAdvice("stage.ema_device=cpu")


def _sharding(config: Config[TrainStage]) -> Iterator[MemoryAdvice]:
    deepspeed = config.deepspeed
    if deepspeed.zero_stage < 2:
        yield MemoryAdvice("deepspeed=zero2")
    elif deepspeed.zero_stage == 2 and ranks.world_size() > 1:
        yield MemoryAdvice("deepspeed=zero3", "weights sharded over the GPUs")
    if not deepspeed.offload_optimizer:
        yield MemoryAdvice(f"deepspeed=zero{max(2, deepspeed.zero_stage)}_offload", "optimizer states in host memory")


def _smaller_samples(config: Config[TrainStage]) -> Iterator[MemoryAdvice]:
    if not config.sampling.vae_tiling and config.stage.sample_every:
        yield MemoryAdvice("sampling.vae_tiling=true", "when memory ran out in a validation")
    yield MemoryAdvice("fewer data.frames, or a smaller data.height and data.width", "run stage=prepare again")
