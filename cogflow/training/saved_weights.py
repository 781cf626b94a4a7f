"""Weights in diffusers' layout, written while they are gathered one by one: no rank holds more than one shard of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cogflow.files.atomic_write import storage_errors, write_json
from cogflow.runtime import ranks
from cogflow.training.engine import Engine

STEM = "diffusion_pytorch_model"
SHARD_BYTES = 4 * 1024**3


def save_weights(folder: Path, engine: Engine, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write ``weights`` below ``folder``. Every rank goes through them, rank 0 holds one shard of them at a time."""
    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        file = folder / f"part-{len(shards):05d}.safetensors"
        with storage_errors(folder):
            save_file(held, file, metadata={"format": "pt"})
        shards.append((file, list(held)))
        held, size = {}, 0

    if ranks.is_main():
        engine.module.save_config(folder)
    for name, weight in weights:
        if not ranks.is_main():
            continue
        held[name] = weight.to("cpu", copy=True).contiguous()
        size += held[name].nbytes
        total += held[name].nbytes
        if size >= SHARD_BYTES:
            flush()
    if not ranks.is_main():
        return
    if held:
        flush()
    if len(shards) == 1:
        shards[0][0].rename(folder / f"{STEM}.safetensors")
        return
    places = {}
    for index, (file, names) in enumerate(shards, start=1):
        final = f"{STEM}-{index:05d}-of-{len(shards):05d}.safetensors"
        file.rename(folder / final)
        places.update(dict.fromkeys(names, final))
    write_json(folder / f"{STEM}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) from the safetensors files of ``folder``, one at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                yield name, opened.get_tensor(name)
