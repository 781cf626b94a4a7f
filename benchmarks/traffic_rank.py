"""Run one rank of :mod:`benchmarks.traffic`: train with the trainer's loop and count the bytes of its steps. Linux
only.

:func:`benchmarks.traffic.count_traffic` runs it under torchrun: ``-m benchmarks.traffic_rank CASES.json RESULTS.json``.

The traffic is counted twice. At the collectives, a dispatch mode sees every operation of torch.distributed that any
library calls, with its tensors; the phase of the step (backward, update, ...) identifies their content. At the sockets,
the kernel counts the bytes that gloo sent over TCP (``bytes_sent`` of ``tcp_info``, without headers and
retransmissions).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.overhead import CLIPS, LATENTS
from cogflow.benchmarking.random_model import RandomClips
from cogflow.config.compose import compose
from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.models import loading, tiny
from cogflow.models.transformer_inputs import TransformerInputs
from cogflow.runtime import ranks
from cogflow.training import deepspeed_start
from cogflow.training import engine as engines
from cogflow.training.callback import Callback, StepUpdate, TrainingContext
from cogflow.training.ema import EMA
from cogflow.training.engine import Engine
from cogflow.training.objective import Objective
from cogflow.training.sequence import RankPlacement
from cogflow.training.setup import build_step_trainer

WARM_UP, STEPS = 2, 1
"""Numbers of warm-up steps, in which ZeRO-3 records its prefetching, and of counted steps."""

KINDS = ("allreduce", "allgather", "reduce_scatter", "broadcast", "reduce")
"""Substrings of the names of torch's operations. Longer substrings come first."""

TCP_INFO_SIZE, BYTES_SENT = 256, 200
"""Size of a buffer for Linux' ``struct tcp_info``, and offset of the field of sent bytes. The field of retransmitted
bytes follows it.
"""


class Collectives(TorchDispatchMode):
    """Add up the bytes of all collectives inside the block, by phase and kind.

    ``phase``: the current phase of the step.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase, self.counting = "rest", False
        self.bytes: dict[tuple[str, str], int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.counting and function.namespace == "c10d":
            kind = next((kind for kind in KINDS if kind in function._opname.lstrip("_")), function._opname)
            key = (self.phase, kind)
            self.bytes[key] = self.bytes.get(key, 0) + _tensor_bytes(args)
        return function(*args, **(kwargs or {}))

    def during(self, phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``work`` with its traffic counted under ``phase``."""

        def within(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return work(*args, **kwargs)
            finally:
                self.phase = before

        return within


def _tensor_bytes(args: Sequence[Any]) -> int:
    """Return the bytes of the whole tensor of an operation: the larger of results and operands."""
    sizes = [sum(leaf.nbytes for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor)) for part in args[:2]]
    return max(sizes, default=0)


def sent_over_tcp() -> int:
    """Return the bytes that the open TCP connections of this process have sent so far."""
    total = 0
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(file.name)).st_mode):
                with socket.socket(fileno=os.dup(int(file.name))) as connection:
                    if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                        total += _sent(connection)
    return total


def _sent(connection: socket.socket) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
    sent, retransmitted = struct.unpack_from("=QQ", info, BYTES_SENT)
    return int(sent - retransmitted)


@contextlib.contextmanager
def limit_reuse(elements: int | None) -> Iterator[None]:
    """Let ZeRO-3 keep gathered weights that are used again within ``elements`` elements; ``None``: DeepSpeed's default,
    which is more than the tiny model has."""
    plain = deepspeed_start.settings

    def settings(*args: Any) -> dict[str, Any]:
        made = plain(*args)
        made["zero_optimization"]["stage3_max_reuse_distance"] = elements
        return made

    if elements is not None:
        setattr(engines, "settings", settings)  # noqa: B010
    try:
        yield
    finally:
        setattr(engines, "settings", plain)  # noqa: B010


def count_step(config: Config[TrainStage], reuse: int | None = None) -> dict[str, Any]:
    """Return the traffic of one step of ``config`` on the tiny model. Collective.

    "operands": bytes of the tensors of collectives by phase and kind. "wire": bytes that this rank sends over TCP.
    """
    stage = config.stage
    device, dtype = ranks.device(), loading.resolve_dtype(config.model, ranks.device())
    transformer = tiny.new_transformer().to(device, dtype).train()
    if config.deepspeed.activation_checkpointing:
        transformer.enable_gradient_checkpointing()
    with limit_reuse(reuse):
        engine = Engine(transformer, config.deepspeed, stage, dtype)
    ema = EMA(engine, stage.ema_decay, every=stage.ema_every) if stage.ema_decay else None
    clips: Any = RandomClips(CLIPS, LATENTS, transformer.config.max_text_seq_length, transformer.config.text_embed_dim)
    alphas = loading.load_scheduler(tiny.folder()).alphas_cumprod
    placement = RankPlacement(config.parallel.sequence)
    objective = Objective(engine, alphas, TransformerInputs(scaling_factor=0.7), placement, device=device, dtype=dtype)
    trainer = build_step_trainer(config, clips, objective, ema=ema)
    collectives = Collectives()
    watched: list[tuple[Any, str]] = [(engine, "forward"), (engine, "backward"), (engine, "step")]
    for owner, name in [*watched, (ema, "after_step")] if ema else watched:
        setattr(owner, name, collectives.during("averages" if owner is ema else name, getattr(owner, name)))
    wire: list[int] = []

    class SentBytes(Callback):
        def on_step_end(self, context: TrainingContext, update: StepUpdate) -> None:
            # After the barrier every rank has sent all of the step.
            ranks.barrier()
            wire.append(sent_over_tcp())
            collectives.counting = WARM_UP <= len(wire) < stage.steps

    trainer.callbacks.items.append(SentBytes())
    with collectives:
        trainer.run()
    steps = stage.steps - WARM_UP
    return {
        "operands": {" ".join(key): total / steps for key, total in collectives.bytes.items()},
        "wire": (wire[-1] - wire[WARM_UP - 1]) / steps,
    }


def main(words: Sequence[str]) -> None:
    """Count the traffic of trainings. ``words``: the file of cases, a list of "words" and "reuse", and the file to
    which rank 0 writes its counts, with the bytes of each rank ("wires")."""
    cases, results = map(Path, words)
    ranks.setup()
    found = []
    for case in json.loads(cases.read_text(encoding="utf-8")):
        one = count_step(compose([*case["words"], f"stage.steps={WARM_UP + STEPS}"]), case["reuse"])
        found.append(one | {"wires": ranks.gather(one["wire"])})
    if ranks.is_main():
        results.write_text(json.dumps(found), encoding="utf-8")
    ranks.close()


if __name__ == "__main__":
    main(sys.argv[1:])
