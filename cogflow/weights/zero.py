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
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch

from cogflow.errors import CheckpointError, ConfigError, DataError, format_list
from cogflow.files.contained_files import read_regular
from cogflow.files.record_io import JsonObject
from cogflow.weights.tensor_source import TensorInfo, contained_file
from cogflow.weights.torch_file import RANDOM_STATES, InertObject, json_values, load_torch_file

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means of the gradient and of its square."""

MOST_MISSING = 8
"""Missing numbers that a message names."""

_AS_STORED = "Use the weights as stored (masters=bf16)."

PickledState: TypeAlias = dict[str, Any]
"""Content of a file of DeepSpeed or SAT, read by the restricted unpickler."""

OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
SHARDED_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")

DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Names in the pickles of DeepSpeed's optimizer states. They are read as inert objects."""

AGAIN = "Copy every file of the checkpoint again; all ranks write to it."
_LAYOUT = "A DeepSpeed checkpoint is a folder with latest, or its global_step<N> folder."

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
        model_files = sharded or [contained_file(self.folder, f"mp_rank_{self.part:02d}_model_states.pt")]
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


# The files of a DeepSpeed checkpoint


def latest_step_folder(folder: Path) -> Path:
    """Return the folder of one step: the one that ``latest`` in ``folder`` names, or ``folder`` itself without
    ``latest``.

    Raises :class:`CheckpointError` if ``latest`` is unreadable or names no folder beside it.
    """
    latest = folder / "latest"
    if not latest.is_file():
        return folder
    try:
        tag = read_regular(latest, 4096).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise CheckpointError(
            f"{latest} cannot be read: {error}", "It must hold one word, the name of a folder beside it."
        ) from error
    if not tag or Path(tag).name != tag or tag == "..":
        raise CheckpointError(
            f"{latest} names no folder beside it: {tag[:60]!r}.",
            "It must hold one word, such as 500 or global_step500.",
        )
    if not (folder / tag).is_dir():
        beside = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise CheckpointError(
            f"{latest} names {tag}, and {folder / tag} does not exist.",
            f"Folders beside it: {', '.join(beside[:8]) or 'none'}. Give one of them, or copy {tag}.",
        )
    return contained_file(folder, tag)


def has_optimizer_states(folder: Path) -> bool:
    """Return whether a step's folder holds ZeRO's optimizer states, which hold the fp32 master weights."""
    return any(OPTIMIZER.fullmatch(path.name) for path in folder.iterdir())


def check_part(folder: Path, part: int | None) -> int:
    """Return the model-parallel part to read. Raises :class:`CheckpointError` for a folder that is no DeepSpeed
    checkpoint.

    ``part`` may be ``None`` only if the checkpoint has one part.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder.", _LAYOUT)
    names = [path.name for path in folder.iterdir()]
    parts = {
        int(match[1]) for name in names if (match := re.search(r"mp_rank_(\d+)_(?:model|optim)_states\.pt$", name))
    }
    if not parts:
        raise CheckpointError(
            f"{folder} holds no mp_rank_00_model_states.pt. It holds {', '.join(sorted(names)[:8]) or 'nothing'}.",
            _LAYOUT,
        )
    if any(name.startswith("expp_rank_") for name in names):
        raise CheckpointError(f"{folder} is of a mixture of experts, which cogflow does not read.")
    if part is None and parts != {0}:
        raise CheckpointError(
            f"{folder} has {len(parts)} model-parallel parts.", "Give the folder, so that all parts are joined."
        )
    return part or 0


def missing_numbers(found: Collection[int]) -> list[int]:
    """Return the first numbers, at most eight, that a sequence from 0 to the largest of ``found`` lacks.

    The work is bounded by the length of ``found``: the numbers are parts of names, which anybody may have chosen.
    """
    lacking = (number for number in range(max(found, default=-1)) if number not in found)
    return list(islice(lacking, MOST_MISSING))


def rank_files(folder: Path, pattern: re.Pattern[str], part: int) -> list[Path]:
    """Return one file per rank, ordered by rank. Raises :class:`CheckpointError` if a rank has no file or two files."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if not match or int(match[2]) != part:
            continue
        rank = int(match[1])
        if rank in found:
            raise CheckpointError(
                f"{folder} holds two files of one rank: {found[rank].name} and {path.name}.", "Remove the older one."
            )
        found[rank] = contained_file(folder, path.name)
    if missing := missing_numbers(found):
        example = found[max(found)].name
        raise CheckpointError(
            f"{folder} lacks the files of ranks {', '.join(map(str, missing))}; the last rank's file is {example}.",
            AGAIN,
        )
    return [found[rank] for rank in sorted(found)]


def read_state_file(path: Path) -> PickledState:
    """Return the content of one of DeepSpeed's state files. Raises :class:`CheckpointError` if it is no dictionary."""
    content = load_torch_file(path, RANDOM_STATES + DEEPSPEED_CLASSES)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not DeepSpeed's states.", AGAIN)
    return content


def read_optimizer_state(path: Path) -> PickledState:
    """Return ``optimizer_state_dict`` of an optimizer state file. Raises :class:`CheckpointError` if there is none."""
    state = read_state_file(path).get("optimizer_state_dict")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no optimizer_state_dict.", AGAIN)
    return state


def zero_stage(state: PickledState, path: Path) -> int:
    """Return the ZeRO stage (1, 2 or 3) that wrote an optimizer state. Raises :class:`CheckpointError` for another."""
    stage = state.get("zero_stage")
    if isinstance(stage, InertObject) and stage.args:
        stage = stage.args[0]
    if stage is None and "single_partition_of_fp32_groups" in state:
        return 1  # DeepSpeed's BF16_Optimizer, used with stage 1, stores no stage
    if stage not in (1, 2, 3):
        raise CheckpointError(f"{path} is of ZeRO stage {stage}; cogflow reads 1, 2 and 3.", _AS_STORED)
    return int(stage)


def flat_groups(value: Any, path: Path) -> list[torch.Tensor]:
    """Return one rank's flat vector of each parameter group. Raises :class:`CheckpointError` if there is none."""
    groups = [value] if isinstance(value, torch.Tensor) else value
    if (
        not isinstance(groups, (list, tuple))
        or not groups
        or not all(isinstance(flat, torch.Tensor) for flat in groups)
    ):
        raise CheckpointError(f"{path} holds no flat groups of master weights.", _AS_STORED)
    return [flat.detach().reshape(-1) for flat in groups]


def adam_moments(state: PickledState, name: str, path: Path) -> tuple[list[torch.Tensor], int]:
    """Return one rank's flat vectors of Adam's moment ``name`` per parameter group, and Adam's number of updates.

    Raises :class:`CheckpointError` if a group has no such moment.
    """
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict")
    by_group = base.get("state") if isinstance(base, dict) else None
    if not isinstance(by_group, dict) or not all(
        isinstance(group, dict) and isinstance(group.get(name), torch.Tensor) for group in by_group.values()
    ):
        raise CheckpointError(
            f"{path} holds no {name} of Adam for each of its groups.", "Check that Adam or AdamW wrote the checkpoint."
        )
    groups = [by_group[number] for number in sorted(by_group)]
    return flat_groups([group[name] for group in groups], path), int(groups[0].get("step", 0))
