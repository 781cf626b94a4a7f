"""The optimizer's states of a parameter, put where DeepSpeed keeps them: each ZeRO stage deals them out in a way of its own."""

from __future__ import annotations

from typing import Any

import torch

from cogflow.training.engine import Engine


def put_states(engine: Engine, parameter: Any, states: dict[str, torch.Tensor]) -> None:
    """Have the optimizer hold this rank's part of ``states`` of one trained parameter: its master ``fp32`` and Adam's moments, whole
    tensors on the CPU. (DeepSpeed's places for them are private: its version is pinned, and tests hold it.)"""
    optimizer = engine.optimizer
    if engine.zero_stage == 0:
        state = optimizer.state[parameter]
        state.setdefault("step", torch.zeros(()))
        state.update({key: value.to(parameter.device).clone() for key, value in states.items() if key != "fp32"})
    elif engine.zero_stage == 3:
        group = optimizer.grad_position[optimizer.get_param_id(parameter)][0]
        _state_of(engine, optimizer.fp32_partitioned_groups_flat[group])
        rank, size = optimizer._get_param_partition_rank(parameter), parameter.ds_tensor.ds_numel
        for key, value in states.items():
            part, _ = optimizer._get_fp32_opt_state_partition(parameter, False, None if key == "fp32" else key)
            mine = value.reshape(-1)[rank * size : (rank + 1) * size]
            part[: len(mine)].data.copy_(mine)
    elif (mapping := parameter._hp_mapping) is not None:
        group = next(i for i, some in enumerate(optimizer.bit16_groups) if any(one is parameter for one in some))
        flat, place, source = (
            optimizer.single_partition_of_fp32_groups[group],
            mapping.hp_fragment_address,
            mapping.lp_fragment_address,
        )
        for key, value in states.items():
            target = flat if key == "fp32" else _state_of(engine, flat)[key]
            mine = value.reshape(-1)[source.start : source.start + source.numel]
            target.data[place.start : place.start + place.numel].copy_(mine)


def _state_of(engine: Engine, flat: torch.Tensor) -> dict[str, Any]:
    """Adam's state of a flat group, which it makes at its first step only."""
    state = engine.optimizer.optimizer.state[flat]
    if "exp_avg" not in state:
        counted = 0 if type(engine.optimizer.optimizer).__name__ == "DeepSpeedCPUAdam" else torch.zeros(())
        state.update(step=counted, exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat))
    return state


def count_steps(engine: Engine, steps: int) -> None:
    """Have Adam go on as after ``steps`` updates, once its states are put."""
    optimizer = engine.optimizer if engine.zero_stage == 0 else engine.optimizer.optimizer
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], steps) if isinstance(state["step"], torch.Tensor) else steps
