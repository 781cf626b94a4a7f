"""The weights in a DeepSpeed checkpoint that ZeRO spread over ranks: read tensor by tensor, never the whole at once.

The layout is DeepSpeed's own (0.19.8: ``engine.py``, ``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``bf16_optimizer.py``; what they
agree on is in ``utils/zero_to_fp32.py``, which the tests compare with). Every rank's file is mapped, and nothing of DeepSpeed is called.

* Stages 1 and 2: a group of parameters is one flat vector, padded at its end, cut into one stretch per rank.
* Stage 3: every parameter is padded and cut into one stretch per rank; a rank's stretches follow each other through its flat groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogflow.errors import CheckpointError, ConfigError
from cogflow.weights.reader import TensorInfo, listed
from cogflow.weights.torchfile import plain_values
from cogflow.weights.zero_files import (
    AGAIN,
    OPTIMIZER,
    SHARDED_MODEL,
    choose_part,
    flat_groups,
    moments,
    of_ranks,
    optimizer_state,
    read_states,
    tagged,
    zero_stage,
)  # fmt: skip


@dataclass(frozen=True)
class _Value:
    """A tensor as views of mapped files that follow each other. ``dtype``: what it is read as."""

    pieces: Sequence[torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    def read(self) -> torch.Tensor:
        flat = self.pieces[0] if len(self.pieces) == 1 else torch.cat(list(self.pieces))
        return flat.reshape(self.shape).to(self.dtype)


class ZeroFolder:
    """The tensors of a DeepSpeed checkpoint: a folder with ``latest``, or the ``global_step<N>`` it names.

    ``weights``: ``fp32``, the master weights that training went on from (parameters and floating buffers in fp32, frozen
    parameters as stored); ``bf16``, the module as stored, whatever its dtype. ``part``: which model-parallel part; with several
    of them it must be given. ``moment``: read what the optimizer keeps under that name in the masters' place, for the trained
    parameters alone; ``adam_steps`` are the updates it has counted. ``metadata``: the plain values beside the weights, and
    ``zero_stage``, ``ranks``, ``masters``, ``tag``.

    Raises :class:`CheckpointError` for what is missing, does not fit together or does not hold the weights asked for.
    """

    def __init__(self, folder: Path, weights: str = "fp32", part: int | None = None, moment: str | None = None) -> None:
        if weights not in ("fp32", "bf16"):
            raise ConfigError(f"Weights of kind {weights} are unknown.", "Choose fp32 or bf16.")
        self.folder = tagged(Path(folder))
        self.part = choose_part(self.folder, part)
        self._moment, self.adam_steps = moment, 0
        self.notes: list[str] = []
        optimizer = of_ranks(self.folder, OPTIMIZER, self.part)
        sharded = of_ranks(self.folder, SHARDED_MODEL, self.part)
        whole = self.folder / f"mp_rank_{self.part:02d}_model_states.pt"
        self.files = (sharded or [whole]) + (optimizer if weights == "fp32" else [])
        self._models = [read_states(path) for path in sharded or [whole]]
        self._module = self._models[0].get("module") or {}
        self._values: dict[str, _Value] = {}
        settings = self._models[0].get("ds_config")
        zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
        stage = 3 if sharded else zero.get("stage", 0) if isinstance(zero, dict) else 0
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
        self.metadata: dict[str, Any] = {
            **plain_values({name: value for name, value in self._models[0].items() if name != "module"}),
            "zero_stage": stage,
            "ranks": max(len(optimizer), len(sharded), 1),
            "masters": weights,
            "tag": self.folder.name,
        }
        step = self.metadata.get("iteration", self.metadata.get("global_steps"))
        self.step: int | None = step if isinstance(step, int) else None

    def read(self, name: str) -> torch.Tensor:
        """One tensor: a copy of its ranks' stretches, or a view of the file where one holds it whole."""
        return self._values[name].read()

    def _take_module(self) -> None:
        """The weights that the network computed with."""
        split = [name for name, shape in self._shapes().items() if not _has(self._module, name, shape)]
        if split:
            raise CheckpointError(
                f"{self.folder} was saved by ZeRO-3 without gathering: {len(split)} tensors, {split[0]} first, are only in the "
                "ranks' optimizer states, as fp32 master weights.",
                "Take the fp32 weights (masters=fp32).",
            )
        self._rest({name: tensor for name, tensor in self._module.items() if isinstance(tensor, torch.Tensor)})

    def _take_full_precision(self) -> None:
        """No optimizer states: the module will do if it is in fp32 itself, as without mixed precision."""
        self._take_module()
        low = [name for name, value in self._values.items() if value.dtype in (torch.bfloat16, torch.float16)]
        if low:
            raise CheckpointError(
                f"{self.folder} holds no fp32 master weights: there are no *_optim_states.pt files, and {low[0]} is in "
                f"{str(self._values[low[0]].dtype).removeprefix('torch.')}.",
                "Take the weights as stored (masters=bf16), or copy the optimizer states, too.",
            )
        self.notes.append("Without optimizer states; the module itself is in fp32.")

    def _take_masters(self, files: list[Path]) -> int:
        """The ranks' flat vectors, cut into tensors. Returns ZeRO's stage."""
        states = [optimizer_state(path) for path in files]
        stage = zero_stage(states[0], files[0])
        count = states[0].get("partition_count", len(files))
        counts = set(count) if isinstance(count, (list, tuple)) else {count}
        if len(counts) > 1:
            raise CheckpointError(
                f"{files[0]} has groups of {sorted(counts)} ranks, as mixtures of experts have; cogflow does not read those.",
                "Take the weights as stored (masters=bf16).",
            )
        if counts != {len(files)}:
            raise CheckpointError(
                f"{self.folder} was saved by {counts.pop()} ranks; the optimizer states of {len(files)} are here.",
                AGAIN,
            )
        if self._moment is None:
            key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
            groups = [flat_groups(state.get(key), path) for state, path in zip(states, files, strict=True)]
        else:
            found = [moments(state, self._moment, path) for state, path in zip(states, files, strict=True)]
            groups, self.adam_steps = [flat for flat, _ in found], found[0][1]
        if len({len(flat) for flat in groups}) > 1:
            raise CheckpointError(f"The ranks in {self.folder} have different numbers of groups.", AGAIN)
        shapes = self._models[0].get("param_shapes")
        if not isinstance(shapes, (list, tuple)) or not shapes:
            raise CheckpointError(
                f"{self.files[0]} says nothing of its parameters' shapes (param_shapes).",
                "DeepSpeed writes it since 0.3.16.",
            )
        if stage == 3:
            if len(self._models) != len(files):
                raise CheckpointError(
                    f"{self.folder} holds {len(self._models)} model states and {len(files)} optimizer states.", AGAIN
                )
            self._cut_parameters(
                groups, {name: tuple(shape) for group in shapes for name, shape in group.items()}, files
            )
        else:
            paddings = states[0].get("param_alignment_paddings")
            self._cut_groups(
                groups, [{name: tuple(shape) for name, shape in group.items()} for group in shapes], paddings, files
            )
        if self._moment is not None:
            return stage
        self._take_frozen(stage)
        buffers = set(self._models[0].get("buffer_names") or ())
        self._rest({name: tensor for name, tensor in self._module.items() if isinstance(tensor, torch.Tensor)}, buffers)
        return stage

    def _cut_groups(
        self,
        groups: list[list[torch.Tensor]],
        shapes: list[dict[str, tuple[int, ...]]],
        paddings: Any,
        files: list[Path],
    ) -> None:
        """Stages 1 and 2: ``groups[rank][group]`` is the rank's stretch of the group's vector."""
        if len(groups[0]) != len(shapes):
            raise CheckpointError(
                f"{files[0]} has {len(groups[0])} groups of parameters, {self.files[0]} {len(shapes)}.", AGAIN
            )
        for number, group in enumerate(shapes):
            parts = [flat[number] for flat in groups]
            gaps = paddings[number] if isinstance(paddings, (list, tuple)) and number < len(paddings) else []
            offset = 0
            for index, (name, shape) in enumerate(group.items()):
                size = math.prod(shape)
                pieces = _stretch(parts, offset, size)
                if sum(map(len, pieces)) != size:
                    raise CheckpointError(
                        f"{name} reaches beyond the end of the ranks' optimizer states in {self.folder}.", AGAIN
                    )
                self._values[name] = _Value(pieces, shape, parts[0].dtype, files[0])
                offset += size + (gaps[index] if index < len(gaps) else 0)
            have, align = (
                sum(map(len, parts)),
                2 * len(files),
            )  # padded to a multiple of this; some versions cut the padding off
            if math.ceil(have / align) != math.ceil(offset / align):
                raise CheckpointError(
                    f"{self.folder}: group {number} has {have} values, its {len(group)} parameters need {offset}.",
                    "These model states and optimizer states do not belong together?",
                )

    def _cut_parameters(
        self, groups: list[list[torch.Tensor]], shapes: dict[str, tuple[int, ...]], files: list[Path]
    ) -> None:
        """Stage 3: ``groups[rank]`` in a row hold the rank's stretch of every parameter."""
        offset, ranks = 0, len(groups)
        for name, shape in shapes.items():
            size = math.prod(shape)
            share = math.ceil(size / ranks)
            wanted = [min(share, max(size - rank * share, 0)) for rank in range(ranks)]  # the rest is padding
            pieces = [
                piece for flat, length in zip(groups, wanted, strict=True) for piece in _stretch(flat, offset, length)
            ]
            if sum(map(len, pieces)) != size:
                raise CheckpointError(
                    f"{name} reaches beyond the end of the ranks' optimizer states in {self.folder}.", AGAIN
                )
            self._values[name] = _Value(pieces, shape, groups[0][0].dtype, files[0])
            offset += share
        for flat, path in zip(groups, files, strict=True):
            if (have := sum(map(len, flat))) != offset:
                raise CheckpointError(
                    f"{path} has {have} values, its parameters need {offset}.",
                    "Files of several checkpoints are mixed?",
                )

    def _take_frozen(self, stage: int) -> None:
        """Frozen parameters are kept beside the module: whole, or (stage 3) a padded stretch per rank."""
        for name, shape in (self._models[0].get("frozen_param_shapes") or {}).items():
            size = math.prod(shape)
            found = [(model.get("frozen_param_fragments") or {}).get(name) for model in self._models]
            pieces = [piece.detach().reshape(-1) for piece in found if isinstance(piece, torch.Tensor)]
            if stage != 3:
                pieces = pieces[:1]
            if len(pieces) != (len(self._models) if stage == 3 else 1) or sum(map(len, pieces)) < size:
                raise CheckpointError(f"{self.folder} does not hold the whole of the frozen parameter {name}.", AGAIN)
            self._values[name] = _Value(_stretch(pieces, 0, size), tuple(shape), pieces[0].dtype, self.files[0])

    def _rest(self, module: Mapping[str, torch.Tensor], buffers: set[str] | frozenset[str] = frozenset()) -> None:
        """Shared parameters, buffers (in fp32, as DeepSpeed restores them), and whatever else the module holds."""
        for name, original in (self._models[0].get("shared_params") or {}).items():
            if original in self._values:
                self._values[name] = self._values[original]
        where = {
            _place(tensor): self._values[name]
            for name, tensor in module.items()
            if name in self._values and tensor.numel()
        }
        lost = []
        for name, tensor in module.items():
            if name in self._values:
                continue
            if tensor.numel() == 0 and self._is_split(name):
                lost.append(name)
                continue
            value = _Value([tensor.detach()], tuple(tensor.shape), tensor.dtype, self.files[0])
            if name in buffers and tensor.is_floating_point():
                value = _Value(value.pieces, value.shape, torch.float32, value.file)
            # tied, though not listed as shared: the same memory under two names
            self._values[name] = where.get(_place(tensor), value) if tensor.numel() else value
        if lost:
            self.notes.append(f"No rank holds these, which are probably tied to others:\n{listed(lost)}")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        listed_groups = [*(self._models[0].get("param_shapes") or []), self._models[0].get("frozen_param_shapes") or {}]
        return {name: tuple(shape) for group in listed_groups for name, shape in group.items()}

    def _is_split(self, name: str) -> bool:
        return len(self._models) > 1 or any(
            not _has(self._module, other, shape) for other, shape in self._shapes().items()
        )


def _stretch(parts: Sequence[torch.Tensor], offset: int, size: int) -> list[torch.Tensor]:
    """Views that make up [offset, offset + size) of vectors that follow each other; shorter where these end."""
    pieces, start = [], 0
    for part in parts:
        first, last = max(offset, start), min(offset + size, start + len(part))
        if first < last:
            pieces.append(part[first - start : last - start])
        start += len(part)
    return pieces or [parts[0][:0]]


def _has(module: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> bool:
    tensor = module.get(name)
    return isinstance(tensor, torch.Tensor) and tuple(tensor.shape) == shape


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
