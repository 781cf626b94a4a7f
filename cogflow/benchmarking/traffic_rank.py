"""One rank of ``stage=benchmark stage.what=traffic``: trains by the trainer's own loop and counts what its steps send. Run by
:func:`cogflow.benchmarking.traffic.measure` under torchrun: ``-m cogflow.benchmarking.traffic_rank CASES.json RESULTS.json``.

Counted twice. At the collectives: a dispatch mode sees every operation of torch.distributed that any library calls, with its tensors, and
the phase of the step (backward, update, ...) says what it carried. At the sockets: what the kernel has sent for this process over TCP
(``bytes_sent`` of ``tcp_info``, without headers and what was sent again), which is what gloo really put on the wire. Linux only.
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

from cogflow.benchmarking.drawn import DrawnClips
from cogflow.benchmarking.overhead import CLIPS, LATENTS
from cogflow.config.compose import compose
from cogflow.config.schema import Config, TrainStage
from cogflow.models import loading, tiny
from cogflow.models.inputs import Inputs
from cogflow.runtime import ranks
from cogflow.training import engine as engines
from cogflow.training.ema import EMA
from cogflow.training.engine import Engine
from cogflow.training.loop import Trainer
from cogflow.training.step_monitor import Hooks

WARM_UP, STEPS = 2, 1
"""Steps that do not count (ZeRO-3 records in them what it will fetch ahead), and steps that do."""

KINDS = ("allreduce", "allgather", "reduce_scatter", "broadcast", "reduce")
"""Parts of the names of torch's operations, the longer first."""

TCP_INFO_SIZE, BYTES_SENT = 256, 200
"""Of Linux' ``struct tcp_info``: room for it, and where in it the bytes that were sent stand, followed by those sent again."""


class Collectives(TorchDispatchMode):
    """Adds up the bytes of all collectives inside the block, by phase and kind. ``phase``: what the step does at present."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.counting = "rest", False
        self.bytes: dict[tuple[str, str], int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.counting and function.namespace == "c10d":
            kind = next((one for one in KINDS if one in function._opname.lstrip("_")), function._opname)
            key = (self.phase, kind)
            self.bytes[key] = self.bytes.get(key, 0) + _whole(args)
        return function(*args, **(kwargs or {}))

    def during(self, phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """``work`` with what it sends counted under ``phase``."""

        def within(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return work(*args, **kwargs)
            finally:
                self.phase = before

        return within


def _whole(args: Sequence[Any]) -> int:
    """Bytes of the whole tensor that an operation goes over: of results and operands the larger."""
    sizes = [sum(leaf.nbytes for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor)) for part in args[:2]]
    return max(sizes, default=0)


def sent_over_tcp() -> int:
    """Bytes that the open TCP connections of this process have sent so far."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.stat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as one:
                    if one.type == socket.SOCK_STREAM and one.family in (socket.AF_INET, socket.AF_INET6):
                        total += _sent(one)
    return total


def _sent(one: socket.socket) -> int:
    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
    sent, again = struct.unpack_from("=QQ", info, BYTES_SENT)
    return int(sent - again)


@contextlib.contextmanager
def kept_for(elements: int | None) -> Iterator[None]:
    """Have ZeRO-3 keep gathered weights that are used again within so many elements; ``None``: as DeepSpeed has it, which is more than
    the tiny model."""
    plain = engines.settings

    def settings(*args: Any) -> dict[str, Any]:
        made = plain(*args)
        made["zero_optimization"]["stage3_max_reuse_distance"] = elements
        return made

    if elements is not None:
        engines.settings = settings  # type: ignore[assignment]
    try:
        yield
    finally:
        engines.settings = plain


def count(config: Config[TrainStage], reuse: int | None = None) -> dict[str, Any]:
    """What one step of ``config`` sends, on the tiny model: ``operands``, bytes that collectives go over by phase and kind, and
    ``wire``, bytes that this rank sends over TCP. Collective."""
    stage = config.stage
    device, dtype = ranks.device(), loading.resolve_dtype(config.model, ranks.device())
    transformer = tiny.new_transformer().to(device, dtype).train()
    if config.deepspeed.activation_checkpointing:
        transformer.enable_gradient_checkpointing()
    with kept_for(reuse):
        engine = Engine(transformer, config.deepspeed, stage, dtype)
    ema = EMA(engine, stage.ema_decay, every=stage.ema_every) if stage.ema_decay else None
    clips: Any = DrawnClips(CLIPS, LATENTS, transformer.config.max_text_seq_length, transformer.config.text_embed_dim)
    alphas = loading.load_scheduler(tiny.folder()).alphas_cumprod
    trainer = Trainer(config, engine, ema, clips, alphas, Inputs(scaling_factor=0.7), device, dtype)
    collectives = Collectives()
    watched: list[tuple[Any, str]] = [(engine, "forward"), (engine, "backward"), (engine, "step")]
    for owner, name in [*watched, (ema, "after")] if ema else watched:
        setattr(owner, name, collectives.during("averages" if owner is ema else name, getattr(owner, name)))
    wire: list[int] = []

    def after(note: str) -> None:
        # Behind it every rank has sent all of the step.
        ranks.barrier()
        wire.append(sent_over_tcp())
        collectives.counting = WARM_UP <= len(wire) < stage.steps

    hooks = Hooks(
        log=_nothing, validate=_nothing, save=_nothing, stopped=_nothing, save_weights=_nothing, stop=lambda: ranks.any_rank(False),
        advance=after, warn=_nothing, not_finite=_nothing,
    )  # fmt: skip
    with collectives:
        trainer.run(0, hooks)
    steps = stage.steps - WARM_UP
    return {
        "operands": {" ".join(key): total / steps for key, total in collectives.bytes.items()},
        "wire": (wire[-1] - wire[WARM_UP - 1]) / steps,
    }


def _nothing(*_: Any) -> None:
    pass


def main(cases: Path, results: Path) -> None:
    """Count each of ``cases``, a list of ``words`` and ``reuse``, and have rank 0 write ``results``: the list of what it counted, and
    what each rank sent (``wires``)."""
    ranks.setup()
    found = []
    for case in json.loads(cases.read_text(encoding="utf-8")):
        one = count(compose([*case["words"], f"stage.steps={WARM_UP + STEPS}"]), case["reuse"])
        found.append(one | {"wires": ranks.gather(one["wire"])})
    if ranks.is_main():
        results.write_text(json.dumps(found), encoding="utf-8")
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
