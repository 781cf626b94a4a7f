"""Read the tensors of a DeepSpeed checkpoint whose weights ZeRO sharded over ranks, one tensor at a time.

The layout is DeepSpeed's (0.19.8: ``engine.py``, ``runtime/zero/stage_1_and_2.py``, ``stage3.py``,
``bf16_optimizer.py``). The tests compare with its own converter, ``utils/zero_to_fp32.py``. Every rank's file is
mapped, and no code of DeepSpeed runs.

* Stages 1 and 2: a parameter group is one flat vector with padding at its end, cut into one shard per rank.
* Stage 3: every parameter is padded and cut into one shard per rank; a rank stores its shards one after another in
  its flat groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogflow.errors import CheckpointError, ConfigError, format_list
from cogflow.files.record_io import JsonObject
from cogflow.weights.tensor_source import TensorInfo
from cogflow.weights.torch_file import json_values
from cogflow.weights.zero_files import (
    AGAIN,
    OPTIMIZER,
    SHARDED_MODEL,
    PickledState,
    adam_moments,
    check_part,
    flat_groups,
    has_optimizer_states,
    latest_step_folder,
    rank_files,
    read_optimizer_state,
    read_state_file,
    zero_stage,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means of the gradient and of its square."""

_AS_STORED = "Use the weights as stored (masters=bf16)."

_Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class _ShardedTensor:
    """A tensor as consecutive views of mapped files. ``dtype``: the dtype that reading returns."""

    pieces: Sequence[torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    def read(self) -> torch.Tensor:
        flat = self.pieces[0] if len(self.pieces) == 1 else torch.cat(list(self.pieces))
        return flat.reshape(self.shape).to(self.dtype)


class ZeroCheckpoint:
    """The tensors of a DeepSpeed checkpoint: a folder with ``latest``, or the ``global_step<N>`` folder it names.

    ``weights``: ``fp32`` reads the master weights (parameters and floating buffers in fp32, frozen parameters as
    stored); ``bf16`` reads the module as stored, whatever its dtype. ``part``: the model-parallel part, required if
    there are several. ``moment``: read this moment of Adam instead of the master weights, for the trained parameters
    only; ``adam_steps`` is then Adam's number of updates. ``metadata``: the plain values beside the weights, and
    ``zero_stage``, ``ranks``, ``masters``, ``tag``. ``notes``: messages for the user.

    Raises :class:`CheckpointError` for files that are missing, do not belong together or lack the requested weights.
    """

    def __init__(self, folder: Path, weights: str = "fp32", part: int | None = None, moment: str | None = None) -> None:
        if weights not in ("fp32", "bf16"):
            raise ConfigError(f"Weights of kind {weights} are unknown.", "Choose fp32 or bf16.")
        self.folder = latest_step_folder(Path(folder))
        self.part = check_part(self.folder, part)
        self._moment = moment
        self.adam_steps = 0
        self.notes: list[str] = []
        optimizer = rank_files(self.folder, OPTIMIZER, self.part)
        sharded = rank_files(self.folder, SHARDED_MODEL, self.part)
        model_files = sharded or [self.folder / f"mp_rank_{self.part:02d}_model_states.pt"]
        self.files = model_files + (optimizer if weights == "fp32" else [])
        self._models = [read_state_file(path) for path in model_files]
        module: Mapping[str, Any] = self._models[0].get("module") or {}
        self._module = {name: tensor for name, tensor in module.items() if isinstance(tensor, torch.Tensor)}
        self._values: dict[str, _ShardedTensor] = {}
        stage = 3 if sharded else self._configured_stage()
        if weights == "bf16":
            self._take_module()
        elif optimizer:
            stage = self._take_masters(optimizer)
        else:
            self._take_full_precision()
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, value.shape, value.dtype, value.file) for name, value in self._values.items()
        }
        if not self.tensors:
            raise CheckpointError(f"{self.folder} holds no weights.", AGAIN)
        self.metadata: JsonObject = {
            **json_values({name: value for name, value in self._models[0].items() if name != "module"}),
            "zero_stage": stage,
            "ranks": max(len(optimizer), len(sharded), 1),
            "masters": weights,
            "tag": self.folder.name,
        }
        step = self.metadata.get("iteration", self.metadata.get("global_steps"))
        self.step: int | None = step if isinstance(step, int) else None

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor: a copy of its shards, or a view of the file if one file holds all of it."""
        return self._values[name].read()

    def _configured_stage(self) -> int:
        settings = self._models[0].get("ds_config")
        zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
        return zero.get("stage", 0) if isinstance(zero, dict) else 0

    def _take_module(self) -> None:
        """Take the weights that the network computed with."""
        sharded = [name for name, shape in self._parameter_shapes().items() if not self._module_holds(name, shape)]
        if sharded:
            raise CheckpointError(
                f"{self.folder} was saved by ZeRO-3 without gathering: {len(sharded)} tensors, {sharded[0]} first, are "
                "only in the ranks' optimizer states, as fp32 master weights.",
                "Use the fp32 weights (masters=fp32).",
            )
        self._take_other_tensors()

    def _take_full_precision(self) -> None:
        """Take the module in place of master weights. Without mixed precision the module is fp32 itself."""
        self._take_module()
        low = [name for name, value in self._values.items() if value.dtype in (torch.bfloat16, torch.float16)]
        if low:
            dtype = str(self._values[low[0]].dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self.folder} holds no fp32 master weights: there are no *_optim_states.pt files, and {low[0]} is in "
                f"{dtype}.",
                "Use the weights as stored (masters=bf16), or copy the optimizer states, too.",
            )
        self.notes.append("There are no optimizer states; the module itself is in fp32.")

    def _take_masters(self, files: list[Path]) -> int:
        """Take the tensors from the ranks' flat vectors. Returns the ZeRO stage."""
        states = [read_optimizer_state(path) for path in files]
        stage = zero_stage(states[0], files[0])
        self._check_rank_count(states[0], files)
        groups = self._read_groups(states, files, stage)
        group_shapes = self._models[0].get("param_shapes")
        if not isinstance(group_shapes, (list, tuple)) or not group_shapes:
            raise CheckpointError(
                f"{self.files[0]} has no shapes of its parameters (param_shapes).",
                "DeepSpeed writes them since 0.3.16.",
            )
        shapes = [{name: tuple(shape) for name, shape in group.items()} for group in group_shapes]
        if stage == 3:
            if len(self._models) != len(files):
                raise CheckpointError(
                    f"{self.folder} holds {len(self._models)} model states and {len(files)} optimizer states.", AGAIN
                )
            self._cut_parameters(groups, {name: shape for group in shapes for name, shape in group.items()}, files)
        else:
            self._cut_groups(groups, shapes, states[0].get("param_alignment_paddings"), files)
        if self._moment is None:
            self._take_frozen(stage)
            self._take_other_tensors(set(self._models[0].get("buffer_names") or ()))
        return stage

    def _check_rank_count(self, state: PickledState, files: list[Path]) -> None:
        count = state.get("partition_count", len(files))
        counts = set(count) if isinstance(count, (list, tuple)) else {count}
        if len(counts) > 1:
            raise CheckpointError(
                f"{files[0]} has groups of {sorted(counts)} ranks, as mixtures of experts have; cogflow does not read "
                "those.",
                _AS_STORED,
            )
        if counts != {len(files)}:
            raise CheckpointError(
                f"{self.folder} was saved by {counts.pop()} ranks; the optimizer states of {len(files)} are here.",
                AGAIN,
            )

    def _read_groups(self, states: list[PickledState], files: list[Path], stage: int) -> list[list[torch.Tensor]]:
        """Return ``groups[rank][group]``, a rank's shard of a parameter group's flat vector."""
        if self._moment is None:
            key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
            groups = [flat_groups(state.get(key), path) for state, path in zip(states, files, strict=True)]
        else:
            moments = [adam_moments(state, self._moment, path) for state, path in zip(states, files, strict=True)]
            groups = [flat for flat, _ in moments]
            self.adam_steps = moments[0][1]
        if len({len(flat) for flat in groups}) > 1:
            raise CheckpointError(f"The ranks in {self.folder} have different numbers of groups.", AGAIN)
        return groups

    def _cut_groups(
        self, groups: list[list[torch.Tensor]], shapes: list[_Shapes], paddings: Any, files: list[Path]
    ) -> None:
        """Cut the tensors of stages 1 and 2. ``groups[rank][group]``: a rank's shard of a group's vector."""
        if len(groups[0]) != len(shapes):
            raise CheckpointError(
                f"{files[0]} has {len(groups[0])} groups of parameters, {self.files[0]} {len(shapes)}.", AGAIN
            )
        for number, group in enumerate(shapes):
            shards = [flat[number] for flat in groups]
            gaps = paddings[number] if isinstance(paddings, (list, tuple)) and number < len(paddings) else []
            offset = 0
            for index, (name, shape) in enumerate(group.items()):
                size = math.prod(shape)
                self._add(name, _views(shards, offset, size), shape, files[0])
                offset += size + (gaps[index] if index < len(gaps) else 0)
            available = sum(map(len, shards))
            # The vector is padded to a multiple of this; some versions of DeepSpeed cut the padding off.
            alignment = 2 * len(files)
            if math.ceil(available / alignment) != math.ceil(offset / alignment):
                raise CheckpointError(
                    f"{self.folder}: group {number} has {available} values, its {len(group)} parameters need {offset}.",
                    "Check that the model states and the optimizer states belong to one checkpoint.",
                )

    def _cut_parameters(self, groups: list[list[torch.Tensor]], shapes: _Shapes, files: list[Path]) -> None:
        """Cut the tensors of stage 3. ``groups[rank]``, concatenated, holds the rank's shard of every parameter."""
        offset = 0
        ranks = len(groups)
        for name, shape in shapes.items():
            size = math.prod(shape)
            shard = math.ceil(size / ranks)
            lengths = [min(shard, max(size - rank * shard, 0)) for rank in range(ranks)]  # without the padding
            pieces = [
                piece for flat, length in zip(groups, lengths, strict=True) for piece in _views(flat, offset, length)
            ]
            self._add(name, pieces, shape, files[0])
            offset += shard
        for flat, path in zip(groups, files, strict=True):
            if (available := sum(map(len, flat))) != offset:
                raise CheckpointError(
                    f"{path} has {available} values, its parameters need {offset}.",
                    "Check that all files belong to one checkpoint.",
                )

    def _add(self, name: str, pieces: list[torch.Tensor], shape: tuple[int, ...], file: Path) -> None:
        if sum(map(len, pieces)) != math.prod(shape):
            raise CheckpointError(
                f"{name} reaches beyond the end of the ranks' optimizer states in {self.folder}.", AGAIN
            )
        self._values[name] = _ShardedTensor(pieces, shape, pieces[0].dtype, file)

    def _take_frozen(self, stage: int) -> None:
        """Take frozen parameters, stored beside the module: whole, or (stage 3) as a padded shard per rank."""
        for name, shape in (self._models[0].get("frozen_param_shapes") or {}).items():
            size = math.prod(shape)
            fragments = [(model.get("frozen_param_fragments") or {}).get(name) for model in self._models]
            pieces = [piece.detach().reshape(-1) for piece in fragments if isinstance(piece, torch.Tensor)]
            if stage != 3:
                pieces = pieces[:1]
            if len(pieces) != (len(self._models) if stage == 3 else 1) or sum(map(len, pieces)) < size:
                raise CheckpointError(f"{self.folder} does not hold all of the frozen parameter {name}.", AGAIN)
            self._values[name] = _ShardedTensor(_views(pieces, 0, size), tuple(shape), pieces[0].dtype, self.files[0])

    def _take_other_tensors(self, buffers: set[str] | frozenset[str] = frozenset()) -> None:
        """Take shared parameters and the rest of the module. Buffers become fp32, as DeepSpeed restores them."""
        for name, original in (self._models[0].get("shared_params") or {}).items():
            if original in self._values:
                self._values[name] = self._values[original]
        taken_memory = {
            _memory_key(tensor): self._values[name]
            for name, tensor in self._module.items()
            if name in self._values and tensor.numel()
        }
        lost = []
        for name, tensor in self._module.items():
            if name in self._values:
                continue
            if tensor.numel() == 0 and self._is_sharded():
                lost.append(name)
                continue
            dtype = torch.float32 if name in buffers and tensor.is_floating_point() else tensor.dtype
            value = _ShardedTensor([tensor.detach()], tuple(tensor.shape), dtype, self.files[0])
            # A tensor that shares the memory of a taken one is tied to it, even if shared_params does not list it.
            self._values[name] = taken_memory.get(_memory_key(tensor), value) if tensor.numel() else value
        if lost:
            self.notes.append(f"No rank holds these tensors; they are probably tied to others:\n{format_list(lost)}")

    def _parameter_shapes(self) -> _Shapes:
        groups = [*(self._models[0].get("param_shapes") or []), self._models[0].get("frozen_param_shapes") or {}]
        return {name: tuple(shape) for group in groups for name, shape in group.items()}

    def _module_holds(self, name: str, shape: tuple[int, ...]) -> bool:
        tensor = self._module.get(name)
        return tensor is not None and tuple(tensor.shape) == shape

    def _is_sharded(self) -> bool:
        return len(self._models) > 1 or any(
            not self._module_holds(name, shape) for name, shape in self._parameter_shapes().items()
        )


def _views(shards: Sequence[torch.Tensor], offset: int, size: int) -> list[torch.Tensor]:
    """Return views of [offset, offset + size) of concatenated vectors; they hold fewer values where the vectors end."""
    pieces = []
    start = 0
    for shard in shards:
        first = max(offset, start)
        last = min(offset + size, start + len(shard))
        if first < last:
            pieces.append(shard[first - start : last - start])
        start += len(shard)
    return pieces or [shards[0][:0]]


def _memory_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


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
