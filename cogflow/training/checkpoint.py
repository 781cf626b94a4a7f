"""Checkpoints that are whole or not there: saved beside, hashed, synced, renamed, read again; then the pointer, then the old ones go.

A checkpoint folder ``step-000100`` holds ``deepspeed/`` (everything needed to go on), ``transformer/`` (and ``ema/``: weights in
diffusers' layout, for export and for people), ``trainer.json`` (where training stood and what it was trained with) and
``manifest.json``. ``latest.json`` beside them names the newest that was read back as it was written.

What a kill at each point leaves: a hidden folder that the next save sweeps away; or a whole checkpoint that the pointer does not name
yet, which is resumed all the same, because resuming goes by what the manifests prove and not by the pointer.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogflow.artifacts.identify import Artifact, ArtifactKind, identify
from cogflow.artifacts.run_layout import LATEST, TRAINER, step_folders, step_name, step_of
from cogflow.errors import CheckpointError, StorageError
from cogflow.files.atomic_write import require_space, storage_errors, sync, write_json
from cogflow.files.hashing import hash_files
from cogflow.files.manifest import check_manifest, files_below, shard_files
from cogflow.files.publish import publish_folder
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.runtime.heartbeat import enter_phase
from cogflow.training.ema import EMA
from cogflow.training.engine import Engine
from cogflow.training.reshard import reshard
from cogflow.training.saved_weights import read_weights, save_weights
from cogflow.weights.zero_files import read_state_file


@dataclass(frozen=True)
class Saved:
    """A checkpoint and what saving it cost: seconds for which training stood still, in all and by part; bytes on the disk."""

    path: Path
    seconds: float
    parts: dict[str, float]
    bytes: int


def save(
    folder: Path, step: int, engine: Engine, ema: EMA | None, trainer: dict[str, Any], *, states: bool = True
) -> Saved:
    """Publish ``folder/step-...``, read it back, and point ``latest.json`` at it. Collective; a step that is already there is replaced.

    ``states``: DeepSpeed's states, too; without them it is for export, and cannot be resumed. Raises :class:`StorageError` when the
    disk has no room or came back changed, and :class:`CheckpointError` for what cannot be written as a whole.
    """
    target, began = folder / step_name(step), time.perf_counter()
    parts: dict[str, float] = {}

    def part(name: str) -> None:
        parts[name] = time.perf_counter() - began - sum(parts.values())
        enter_phase(f"step {step}: saving, after its {name}")

    needed = needed_bytes(folder, engine, ema, states=states)
    ranks.run_on_main(lambda: require_space(target, needed))
    known: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        partial: Path = ranks.run_on_main(
            lambda: stack.enter_context(publish_folder(target, replace=True, known=known))
        )
        if states:
            with own_errors(target):
                engine.save(partial / "deepspeed")
            part("states")
        with own_errors(target):
            save_weights(partial / "transformer", engine, engine.weights())
            if ema is not None:
                save_weights(partial / "ema", engine, ema.weights(engine))
            if ranks.is_main():
                write_json(partial / TRAINER, trainer)
        ranks.barrier()
        part("weights")
        known.update(hash_together(partial))
        part("hashes")
    part("publishing")
    # The renaming is done when rank 0 left the block.
    ranks.barrier()
    if problems := verified(target):
        raise StorageError(
            f"{target} came back from the disk changed: {problems[0]}",
            "The disk is failing; older checkpoints are kept.",
        )
    part("verifying")
    size = sum((target / name).stat().st_size for name in files_below(target)) if ranks.is_main() else 0
    if ranks.is_main() and states:
        point_at(target)
    return Saved(target, time.perf_counter() - began, parts, size)


def point_at(path: Path) -> None:
    """Have ``latest.json`` name a checkpoint that was verified. Rank 0 only."""
    size = sum((path / name).stat().st_size for name in files_below(path))
    write_json(path.parent / LATEST, {"step": step_of(path), "checkpoint": path.name, "bytes": size})


@contextlib.contextmanager
def own_errors(path: Path) -> Iterator[None]:
    """What the disk refuses this rank alone, as an error that names ``path`` and is told by this rank."""
    with ranks.tag_rank_errors(), storage_errors(path):
        yield


def needed_bytes(folder: Path, engine: Engine, ema: EMA | None, *, states: bool) -> int:
    """Of a checkpoint beside ``folder``'s others: what the last one took, or what the parameters tell."""
    if states and ranks.is_main():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(1.02 * int(json.loads((folder / LATEST).read_text())["bytes"]))
    trained, total, size = engine.sizes()
    weights = total * size + (4 * total if ema is not None else 0)
    return weights + (trained * 12 + total * size if states else 0)


def hash_together(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder`` by relative path, synced and hashed by all ranks side by side. Collective."""
    sizes = ranks.broadcast(
        {name: (folder / name).stat().st_size for name in files_below(folder)} if ranks.is_main() else None
    )
    mine = shard_files(sizes, ranks.rank(), ranks.world_size())
    with own_errors(folder):
        for name in mine:
            sync(folder / name)
        hashes = hash_files([folder / name for name in mine])
    shards = ranks.gather({name: hashes[folder / name] for name in mine})
    return {name: sha256 for shard in shards for name, sha256 in shard.items()}


def verified(path: Path) -> list[str]:
    """What of ``path`` is not as its manifest says, the same on every rank; each reads a share. Collective."""
    found = ranks.gather(
        check_manifest(path, ranks.rank(), ranks.world_size()) if path.is_dir() else ["there is no such folder"]
    )
    return sorted({problem for problems in found for problem in problems})


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that its manifest proves whole, and a line for each newer one that was passed over. Collective."""
    passed: list[str] = []
    for path in ranks.broadcast(step_folders(folder)[::-1]):
        problems = verified(path)
        if not problems:
            if ranks.is_main():
                point_at(path)
            return path, passed
        passed.append(f"{path.name}: {problems[0]}" + (f" and {len(problems) - 1} more" if len(problems) > 1 else ""))
    return None, passed


def find(resume: str, folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that ``stage.resume`` means (auto, never or a path), the same on every rank. Collective."""
    if resume == "never":
        return None, []
    if resume == "auto":
        return newest(folder)
    path = Path(resume).expanduser()
    artifact: Artifact = ranks.run_on_main(lambda: identify(path, key="stage.resume"))
    if artifact.kind is not ArtifactKind.CHECKPOINT:
        raise CheckpointError(
            f"stage.resume={resume} is {artifact.kind.label} ({artifact.reason}), not a checkpoint.",
            f"Name a checkpoint such as checkpoints/{step_name(100)}, or use auto.",
        )
    echo(artifact.line("stage.resume"))
    if problems := verified(path):
        raise CheckpointError(
            f"stage.resume={resume} cannot be resumed: {problems[0]}",
            f"Name a checkpoint such as checkpoints/{step_name(100)}, or use auto.",
        )
    if not (path / "deepspeed").is_dir():
        raise CheckpointError(
            f"stage.resume={resume} holds weights alone, without the optimizer's states.",
            f"Start a new run from it with stage.start={resume}, or resume a folder checkpoints/step-...",
        )
    return path, []


def load(path: Path, engine: Engine, ema: EMA | None, *, same_layout: bool = True) -> dict[str, Any]:
    """Bring engine and averages back to where ``path`` was saved; returns its ``trainer.json``. Collective.

    ``same_layout``: whether world size and ZeRO stage are those it was saved with; else the states are dealt out anew.
    """
    trainer = read_trainer(path)
    if same_layout:
        check_pickles(path / "deepspeed")
        engine.load(path / "deepspeed")
    else:
        reshard(path, engine)
    if ema is not None:
        if not (path / "ema").is_dir():
            raise CheckpointError(
                f"{path} holds no averaged weights.", "It was trained with stage.ema_decay=0; resume with that."
            )
        ema.load(read_weights(path / "ema"), int(trainer["ema_updates"]))
    return trainer


def check_pickles(folder: Path) -> None:
    """DeepSpeed unpickles freely what it loads: have a reader that builds nothing look at every file first. Collective.

    Raises :class:`CheckpointError` for a file that holds more than tensors and plain values.
    """
    files = sorted(folder.rglob("*.pt"))
    for file in files[ranks.rank() :: ranks.world_size()]:
        read_state_file(file)
    ranks.barrier()


def read_trainer(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / TRAINER).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / TRAINER} cannot be read: {error}", "Resume from another checkpoint.") from error
