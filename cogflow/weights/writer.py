"""Cast a component's tensors and write them in shards, one shard in memory at a time, with the facts of each tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from cogflow.errors import ConfigError
from cogflow.weights.reader import STEM, TensorInfo, WeightsFolder

CHUNK = 1 << 22


@dataclass(frozen=True)
class TensorFacts:
    """One tensor before and after the cast. ``changed`` is the largest absolute change of a value."""

    name: str
    shape: list[int]
    dtype_in: str
    dtype_out: str
    mean_in: float
    std_in: float
    absmax_in: float
    mean_out: float
    std_out: float
    absmax_out: float
    changed: float
    became_inf: int
    became_zero: int
    nonfinite: int


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, TensorFacts]:
    """``tensor`` in ``dtype`` and its facts. ``nonfinite`` counts NaN and infinity of the source; statistics leave them out."""
    result = tensor.to(dtype)
    before, after = _Moments(), _Moments()
    changed, became_inf, became_zero, nonfinite = 0.0, 0, 0, 0
    old, new = tensor.reshape(-1), result.reshape(-1)
    # Statistics are in double precision; by chunks, so that they cost no second copy of a large tensor.
    for start in range(0, old.numel(), CHUNK):
        a, b = old[start : start + CHUNK].double(), new[start : start + CHUNK].double()
        a_finite, b_finite = a.isfinite(), b.isfinite()
        both = a_finite & b_finite
        nonfinite += int((~a_finite).sum())
        became_inf += int((a_finite & ~b_finite).sum())
        became_zero += int(((a != 0) & (b == 0)).sum())
        before.add(a[a_finite])
        after.add(b[b_finite])
        changed = max(changed, _absmax((a - b)[both]))
    facts = TensorFacts(
        name,
        list(tensor.shape),
        _name(tensor.dtype),
        _name(dtype),
        *before.summary(),
        *after.summary(),
        changed,
        became_inf,
        became_zero,
        nonfinite,
    )
    return result, facts


def target_dtype(info: TensorInfo, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is cast to: ``dtype``, or what it is for None and for integers."""
    return dtype if dtype is not None and info.dtype.is_floating_point else info.dtype


def write_weights(
    source: WeightsFolder,
    names: list[str],
    dtype: torch.dtype | None,
    folder: Path,
    max_shard_size: str,
    report: Callable[[TensorFacts], None],
) -> list[Path]:
    """Write the tensors ``names`` of ``source``, in that order, cast to ``dtype`` (None: as they are), into ``folder``.

    One file ``diffusion_pytorch_model.safetensors``, or shards of at most ``max_shard_size`` (such as 5GB) and their index.
    ``report`` is called once per tensor. Returns the files written. Integer tensors are never cast.
    """
    infos = {name: source.tensors[name] for name in names}
    plan = {name: torch.empty(info.shape, dtype=target_dtype(info, dtype), device="meta") for name, info in infos.items()}
    try:
        split = split_torch_state_dict_into_shards(plan, filename_pattern=STEM + "{suffix}.safetensors", max_shard_size=max_shard_size)
    except ValueError as error:
        raise ConfigError(f"stage.max_shard_size={max_shard_size}: {error}", "Give a number and a unit, such as 5GB or 500MB.") from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for file, members in split.filename_to_tensors.items():
        shard: dict[str, torch.Tensor] = {}
        for name in members:
            tensor, facts = cast(name, source.read(name), plan[name].dtype)
            shard[name] = tensor.contiguous()
            report(facts)
        save_file(shard, folder / file, metadata={"format": "pt"})
        written.append(folder / file)
    if split.is_sharded:
        index = folder / f"{STEM}.safetensors.index.json"
        index.write_text(_json({"metadata": split.metadata, "weight_map": split.tensor_to_filename}), encoding="utf-8")
        written.append(index)
    return written


class _Moments:
    """Mean, standard deviation and largest magnitude over chunks of doubles."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares, self.absmax = 0, 0.0, 0.0, 0.0

    def add(self, values: torch.Tensor) -> None:
        n = values.numel()
        if n == 0:
            return
        mean, delta = float(values.mean()), float(values.mean()) - self.mean
        self.squares += float((values - mean).square().sum()) + delta * delta * self.count * n / (self.count + n)
        self.count += n
        self.mean += delta * n / self.count
        self.absmax = max(self.absmax, _absmax(values))

    def summary(self) -> tuple[float, float, float]:
        return self.mean, (self.squares / self.count) ** 0.5 if self.count else 0.0, self.absmax


def _absmax(values: torch.Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
