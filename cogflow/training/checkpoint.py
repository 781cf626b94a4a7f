"""Checkpoints that are whole or not there: saved beside, hashed, renamed; the newest verified one is resumed.

A checkpoint folder ``step-000100`` holds ``deepspeed/`` (everything needed to go on), ``transformer/`` (and ``ema/``: weights in
diffusers' layout, for export and for people), ``trainer.json`` (where training stood and what it was trained with) and
``manifest.json``.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cogflow import ranks
from cogflow.errors import CheckpointError
from cogflow.files.manifest import check_manifest
from cogflow.files.publish import publish_folder, write_json
from cogflow.training.ema import EMA
from cogflow.training.engine import Engine

STEP = re.compile(r"step-(\d{6,})$")
SHARD_BYTES = 4 * 1024**3


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def save(folder: Path, step: int, engine: Engine, ema: EMA | None, trainer: dict[str, Any]) -> Path:
    """Publish ``folder/step-...`` and return it. Collective; a step that is already there is replaced."""
    target = folder / step_name(step)
    with contextlib.ExitStack() as stack:
        partial = ranks.broadcast(stack.enter_context(publish_folder(target, replace=True)) if ranks.is_main() else None)
        engine.save(partial / "deepspeed")
        _save_weights(partial / "transformer", engine, engine.weights())
        if ema is not None:
            _save_weights(partial / "ema", engine, ema.weights(engine))
        if ranks.is_main():
            write_json(partial / "trainer.json", trainer)
        ranks.barrier()
    # The renaming is done when rank 0 left the block.
    ranks.barrier()
    return target


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that its manifest proves whole, and a line for each newer one that was passed over."""
    passed: list[str] = []
    for path in sorted((p for p in folder.glob("step-*") if STEP.match(p.name)), key=lambda p: int(p.name[5:]), reverse=True):
        problems = check_manifest(path)
        if not problems:
            return path, passed
        passed.append(f"{path.name}: {problems[0]}" + (f" and {len(problems) - 1} more" if len(problems) > 1 else ""))
    return None, passed


def find(resume: str, folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that ``stage.resume`` means (auto, never or a path), the same on every rank."""
    if resume == "never":
        return None, []
    if resume == "auto":
        # One rank hashes; the others believe it.
        return ranks.broadcast(newest(folder) if ranks.is_main() else None)
    path = Path(resume).expanduser()
    problems = ranks.broadcast((check_manifest(path) if path.is_dir() else ["there is no such folder"]) if ranks.is_main() else None)
    if problems:
        raise CheckpointError(f"stage.resume={resume} cannot be resumed: {problems[0]}", "Name a folder checkpoints/step-..., or use auto.")
    return path, []


def load(path: Path, engine: Engine, ema: EMA | None) -> dict[str, Any]:
    """Bring engine and averages back to where ``path`` was saved; returns its ``trainer.json``. Collective."""
    trainer = read_trainer(path)
    engine.load(path / "deepspeed")
    if ema is not None:
        if not (path / "ema").is_dir():
            raise CheckpointError(f"{path} holds no averaged weights.", "It was trained with stage.ema_decay=0; resume with that.")
        ema.load(read_weights(path / "ema"), int(trainer["ema_updates"]))
    return trainer


def read_trainer(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "trainer.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'trainer.json'} cannot be read: {error}", "Resume from another checkpoint.") from error


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) from the safetensors files of ``folder``, one at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                yield name, opened.get_tensor(name)


def remove_old(folder: Path, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` checkpoints. Called after a new one is published, so one is always there."""
    if not ranks.is_main():
        return
    paths = sorted((p for p in folder.glob("step-*") if STEP.match(p.name)), key=lambda p: int(p.name[5:]))
    for path in paths[: -max(1, keep_last)]:
        shutil.rmtree(path)


def _save_weights(folder: Path, engine: Engine, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write ``weights`` in diffusers' layout. Every rank goes through the weights, rank 0 holds one shard of them at a time."""
    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        file = folder / f"part-{len(shards):05d}.safetensors"
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
    stem = "diffusion_pytorch_model"
    if len(shards) == 1:
        shards[0][0].rename(folder / f"{stem}.safetensors")
        return
    places = {}
    for index, (file, names) in enumerate(shards, start=1):
        final = f"{stem}-{index:05d}-of-{len(shards):05d}.safetensors"
        file.rename(folder / final)
        places.update(dict.fromkeys(names, final))
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
