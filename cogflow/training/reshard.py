"""A checkpoint's states dealt out to another number of ranks, or to another ZeRO stage: parameter by parameter, each rank its own part."""

from __future__ import annotations

from pathlib import Path

import torch

from cogflow.errors import CheckpointError
from cogflow.runtime import ranks
from cogflow.runtime.progress import progress
from cogflow.training.engine import TAG, Engine
from cogflow.training.optimizer_states import count_steps, put_states
from cogflow.training.saved_weights import read_weights
from cogflow.weights.zero import MOMENTS, SavedAdamStates


def reshard(path: Path, engine: Engine) -> None:
    """Bring ``engine`` to where the checkpoint ``path`` stands, whoever saved it. Collective; only call it on verified folders.

    Masters, Adam's moments and its count are those of the checkpoint to the bit, wherever their parts lie now. fp16's loss scale
    begins anew. Raises :class:`CheckpointError` for states of other parameters.
    """
    parameters = dict(engine.module.named_parameters())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    saved = SavedAdamStates(path / "deepspeed" / TAG, trained)
    engine.settle()
    with progress(len(parameters), "dealing out states") as bar:
        for name, parameter in parameters.items():
            master = saved.read(name, "fp32")
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if tuple(master.shape) != shape:
                raise CheckpointError(
                    f"{name} is {tuple(master.shape)} in {path}, {shape} in the model.", "It is of another model?"
                )
            with engine.whole([parameter], modifier_rank=0), torch.no_grad():
                parameter.copy_(master)
            if parameter.requires_grad:
                put_states(engine, parameter, {"fp32": master, **{key: saved.read(name, key) for key in MOMENTS}})
            bar.advance()
    _buffers(path, engine)
    count_steps(engine, saved.steps)
    ranks.barrier()


def _buffers(path: Path, engine: Engine) -> None:
    """I2V's learned positions, which are no parameters."""
    names = {name for name, _ in engine.module.named_parameters()}
    buffers = {name: buffer for name, buffer in engine.module.named_buffers() if name not in names}
    if not buffers:
        return
    for name, value in read_weights(path / "transformer"):
        if name in buffers:
            buffers[name].copy_(value)
