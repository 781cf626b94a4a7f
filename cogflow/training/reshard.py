"""Resharding: load the states of a checkpoint with another number of ranks or another ZeRO stage, parameter by
parameter.

Each ZeRO stage keeps Adam's states in its own way. (The places are private names of DeepSpeed: its version is pinned,
and tests check them.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cogflow.errors import CheckpointError
from cogflow.runtime import ranks
from cogflow.runtime.progress import progress
from cogflow.training.engine import TAG, Engine
from cogflow.training.saved_weights import read_weights
from cogflow.weights.zero import (
    AGAIN,
    MOMENTS,
    PickledState,
    ZeroCheckpoint,
    has_optimizer_states,
    read_state_file,
)


def reshard(path: Path, engine: Engine) -> None:
    """Load the states of the checkpoint ``path`` into ``engine``, whatever layout it was saved with. Collective.

    Call it on verified folders only. Master weights, Adam's moments and its step count equal those of the checkpoint to
    the bit; fp16's loss scale starts again. Raises :class:`CheckpointError` for states of other parameters.
    """
    parameters = dict(engine.module.named_parameters())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    saved = SavedAdamStates(path / "deepspeed" / TAG, trained)
    engine.flush_prefetch()
    with progress(len(parameters), "resharding states") as bar:
        for name, parameter in parameters.items():
            master = saved.read(name, "fp32")
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if tuple(master.shape) != shape:
                raise CheckpointError(
                    f"{name} is {tuple(master.shape)} in {path}, {shape} in the model.",
                    "Resume with the model that the checkpoint was trained from.",
                )
            with engine.whole([parameter], modifier_rank=0), torch.no_grad():
                parameter.copy_(master)
            if parameter.requires_grad:
                put_states(engine, parameter, {"fp32": master, **{key: saved.read(name, key) for key in MOMENTS}})
            bar.advance()
    _copy_buffers(path, engine)
    set_step_count(engine, saved.steps)
    ranks.barrier()


def put_states(engine: Engine, parameter: Any, states: dict[str, torch.Tensor]) -> None:
    """Copy this rank's part of ``states`` into the optimizer.

    ``states``: whole tensors on the CPU for one trained parameter: its master weight ``fp32`` and Adam's moments.
    """
    if engine.zero_stage == 0:
        state = engine.optimizer.state[parameter]
        state.setdefault("step", torch.zeros(()))
        state.update({key: value.to(parameter.device).clone() for key, value in states.items() if key != "fp32"})
    elif engine.zero_stage == 3:
        _put_zero3(engine, parameter, states)
    elif parameter._hp_mapping is not None:
        _put_zero12(engine, parameter, states)


def set_step_count(engine: Engine, steps: int) -> None:
    """Set Adam's step count of all parameters, after :func:`put_states`."""
    optimizer = engine.optimizer if engine.zero_stage == 0 else engine.optimizer.optimizer
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], steps) if isinstance(state["step"], torch.Tensor) else steps


def _put_zero3(engine: Engine, parameter: Any, states: dict[str, torch.Tensor]) -> None:
    optimizer = engine.optimizer
    group = optimizer.grad_position[optimizer.get_param_id(parameter)][0]
    _adam_state(engine, optimizer.fp32_partitioned_groups_flat[group])
    rank, size = optimizer._get_param_partition_rank(parameter), parameter.ds_tensor.ds_numel
    for key, value in states.items():
        part, _ = optimizer._get_fp32_opt_state_partition(parameter, False, None if key == "fp32" else key)
        mine = value.reshape(-1)[rank * size : (rank + 1) * size]
        part[: len(mine)].data.copy_(mine)


def _put_zero12(engine: Engine, parameter: Any, states: dict[str, torch.Tensor]) -> None:
    optimizer, mapping = engine.optimizer, parameter._hp_mapping
    group = next(
        index for index, members in enumerate(optimizer.bit16_groups) if any(member is parameter for member in members)
    )
    flat = optimizer.single_partition_of_fp32_groups[group]
    source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
    for key, value in states.items():
        states_of_group = flat if key == "fp32" else _adam_state(engine, flat)[key]
        mine = value.reshape(-1)[source.start : source.start + source.numel]
        states_of_group.data[target.start : target.start + target.numel].copy_(mine)


def _adam_state(engine: Engine, flat: torch.Tensor) -> dict[str, Any]:
    """Return Adam's state of a flat group; Adam itself creates it at its first step only."""
    state: dict[str, Any] = engine.optimizer.optimizer.state[flat]
    if "exp_avg" not in state:
        on_host = type(engine.optimizer.optimizer).__name__ == "DeepSpeedCPUAdam"
        state.update(
            step=0 if on_host else torch.zeros(()), exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat)
        )
    return state


def _copy_buffers(path: Path, engine: Engine) -> None:
    """Copy the learned positions of image-to-video models, which are buffers and no parameters."""
    names = {name for name, _ in engine.module.named_parameters()}
    buffers = {name: buffer for name, buffer in engine.module.named_buffers() if name not in names}
    if not buffers:
        return
    for name, value in read_weights(path / "transformer"):
        if name in buffers:
            buffers[name].copy_(value)


class SavedAdamStates:
    """The fp32 master weights and Adam's moments of each parameter, for every ZeRO stage (0 to 3) and number of
    ranks.

    ``trained``: names of the trained parameters in the model's order, by which stage 0 numbers them. ``steps``:
    Adam's number of updates. Tensors are mapped and read one at a time; DeepSpeed's own converter
    (``checkpoint/ds_to_universal.py``) writes every state to the disk again, loads pickles, and does not support
    stage 0. Raises :class:`CheckpointError` for a folder that does not hold all states.
    """

    def __init__(self, folder: Path, trained: Sequence[str]) -> None:
        self.folder = folder
        self._masters = ZeroCheckpoint(folder)
        self._numbers = {name: str(index) for index, name in enumerate(trained)}
        self._moments: dict[str, ZeroCheckpoint] = {}
        self._unsharded: dict[str, PickledState] = {}
        if has_optimizer_states(folder):
            self._moments = {key: ZeroCheckpoint(folder, moment=key) for key in MOMENTS}
            self.steps = self._moments[MOMENTS[0]].adam_steps
            return
        optimizer = read_state_file(folder / "mp_rank_00_model_states.pt").get("optimizer")
        if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
            raise CheckpointError(f"{folder} holds no optimizer states.", AGAIN)
        self._unsharded = {str(number): state for number, state in optimizer["state"].items()}
        if set(self._unsharded) != set(self._numbers.values()):
            raise CheckpointError(
                f"{folder} holds optimizer states of {len(self._unsharded)} parameters, {len(trained)} are trained.",
                "Use the same stage.freeze.",
            )
        self.steps = int(next(iter(self._unsharded.values()))["step"])

    def read(self, name: str, key: str) -> torch.Tensor:
        """Return the master weight (key ``fp32``) or a moment (a key of MOMENTS) in the parameter's shape, fp32."""
        if key == "fp32":
            return self._masters.read(name)
        if self._moments:
            return self._moments[key].read(name)
        moment: torch.Tensor = self._unsharded[self._numbers[name]][key]
        return moment.detach().float()
