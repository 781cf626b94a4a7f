"""Checkpoint folders: saved beside their target, hashed, synced, renamed and read back; then ``latest.json`` points at
them.

A checkpoint folder ``step-000100`` holds ``deepspeed/`` (states to resume from), ``transformer/`` and ``ema/`` (weights
in diffusers' layout, for export), ``trainer.json`` (:class:`~cogflow.records.training.TrainerRecord`) and
``manifest.json``. ``latest.json`` beside the folders names the newest that was read back without a difference.

A kill during a save leaves a hidden folder, which the next save removes, or a whole checkpoint that ``latest.json``
does not name yet. Such a checkpoint is resumed, because resuming relies on manifests and not on ``latest.json``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogflow.artifacts.identify import Artifact, ArtifactKind, identify
from cogflow.artifacts.run_history import point_at
from cogflow.artifacts.run_layout import step_name
from cogflow.config.command import options
from cogflow.errors import CheckpointError, StorageError
from cogflow.files.atomic_write import require_space, storage_errors, sync
from cogflow.files.hashing import hash_files
from cogflow.files.publish import check_manifest, files_below, publish_folder, shard_files
from cogflow.files.record_io import read_record, write_record
from cogflow.records.training_records import LatestCheckpoint, TrainerRecord
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.runtime.heartbeat import enter_phase
from cogflow.training.ema import EMA
from cogflow.training.engine import Engine
from cogflow.training.reshard import reshard
from cogflow.training.saved_weights import read_weights, save_weights
from cogflow.weights.zero import read_state_file


@dataclass(frozen=True)
class SavedCheckpoint:
    """A saved checkpoint.

    ``seconds``: for which training stood still; ``phases``: the same by phase; ``bytes``: size on the disk.
    """

    path: Path
    seconds: float
    phases: dict[str, float]
    bytes: int


def read_trainer(path: Path) -> TrainerRecord:
    """Return ``trainer.json`` of the checkpoint ``path``. Raises :class:`CheckpointError` when it cannot be read."""
    return read_record(path / TrainerRecord.file_name, TrainerRecord)


def save(
    folder: Path, record: TrainerRecord, engine: Engine, ema: EMA | None, *, states: bool = True
) -> SavedCheckpoint:
    """Publish ``folder/step-...``, read it back, and point ``latest.json`` at it.

    Collective; an existing folder is replaced.

    ``states``: with DeepSpeed's states; without them the folder can be exported and not resumed. Raises
    :class:`StorageError` when the disk has no room or returns other bytes, and :class:`CheckpointError` when the
    checkpoint cannot be written as a whole.
    """
    began = time.perf_counter()
    target = folder / step_name(record.step)
    phases: dict[str, float] = {}

    def end_phase(name: str) -> None:
        phases[name] = time.perf_counter() - began - sum(phases.values())
        enter_phase(f"step {record.step}: saving, after its {name}")

    needed = needed_bytes(folder, engine, ema, states=states)
    ranks.run_on_main(lambda: require_space(target, needed))
    known: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        partial: Path = ranks.run_on_main(
            lambda: stack.enter_context(publish_folder(target, replace=True, known=known))
        )
        if states:
            with rank_storage_errors(target):
                engine.save(partial / "deepspeed")
            end_phase("states")
        with rank_storage_errors(target):
            save_weights(partial / "transformer", engine, engine.weights())
            if ema is not None:
                save_weights(partial / "ema", engine, ema.weights(engine))
            if ranks.is_main():
                write_record(partial / TrainerRecord.file_name, record)
        ranks.barrier()
        end_phase("weights")
        known.update(hash_together(partial))
        end_phase("hashes")
    end_phase("publishing")
    # Rank 0 renames the folder when it leaves the block; the others wait for that here.
    ranks.barrier()
    if problems := verify(target):
        raise StorageError(
            f"{target} differs from what was written: {problems[0]}",
            "The disk is failing; older checkpoints are kept.",
        )
    end_phase("verifying")
    size = sum((target / name).stat().st_size for name in files_below(target)) if ranks.is_main() else 0
    if ranks.is_main() and states:
        point_at(target)
    return SavedCheckpoint(target, time.perf_counter() - began, phases, size)


def load(path: Path, record: TrainerRecord, engine: Engine, ema: EMA | None, *, same_layout: bool = True) -> None:
    """Load engine and EMA from the checkpoint ``path``, whose ``trainer.json`` is ``record``. Collective.

    ``same_layout``: whether ranks and ZeRO stage are those of the save; otherwise the states are resharded.
    """
    if same_layout:
        check_pickles(path / "deepspeed")
        engine.load(path / "deepspeed")
    else:
        reshard(path, engine)
    if ema is not None:
        if not (path / "ema").is_dir():
            raise CheckpointError(
                f"{path} holds no EMA weights.", "It was trained with stage.ema_decay=0; resume with that."
            )
        ema.load(read_weights(path / "ema"), record.ema_updates)


def open_named(resume: str) -> Path:
    """Return the checkpoint that ``stage.resume=PATH`` names, verified. Collective.

    Raises :class:`CheckpointError` for a path that is no checkpoint to resume from.
    """
    path = Path(resume).expanduser()
    artifact: Artifact = ranks.run_on_main(lambda: identify(path, key="stage.resume"))
    if artifact.kind is not ArtifactKind.CHECKPOINT:
        raise CheckpointError(
            f"stage.resume={resume} is {artifact.kind.label} ({artifact.reason}), not a checkpoint.",
            f"Name a checkpoint such as checkpoints/{step_name(100)}, or use auto.",
        )
    echo(artifact.line("stage.resume", has_kind_setting=False))
    if problems := verify(path):
        raise CheckpointError(
            f"stage.resume={resume} cannot be resumed: {problems[0]}",
            f"Name a checkpoint such as checkpoints/{step_name(100)}, or use auto.",
        )
    if not (path / "deepspeed").is_dir():
        raise CheckpointError(
            f"stage.resume={resume} holds weights without optimizer states.",
            f"Start a new run from it with {options({'stage.start': resume})}, or resume a folder checkpoints/step-...",
        )
    return path


def newest_whole(paths: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """Return the last of ``paths`` (oldest first) that its manifest proves whole, and a line for each later one that is
    not.

    Collective: every rank gives the same paths.
    """
    damaged: list[str] = []
    for path in reversed(paths):
        problems = verify(path)
        if not problems:
            return path, damaged
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        damaged.append(f"{path.name}: {problems[0]}{more}")
    return None, damaged


def verify(path: Path) -> list[str]:
    """Return the differences between ``path`` and its manifest, the same on every rank. Each rank reads a part.

    Collective.
    """
    found = ranks.gather(
        check_manifest(path, ranks.rank(), ranks.world_size()) if path.is_dir() else ["there is no such folder"]
    )
    return sorted({problem for problems in found for problem in problems})


def needed_bytes(folder: Path, engine: Engine, ema: EMA | None, *, states: bool) -> int:
    """Return the bytes that a checkpoint will need: those of the last one, or an estimate from the parameters."""
    if states and ranks.is_main():
        with contextlib.suppress(CheckpointError):
            return int(1.02 * read_record(folder / LatestCheckpoint.file_name, LatestCheckpoint).bytes)
    trained, total, size = engine.sizes()
    weights = total * size + (4 * total if ema is not None else 0)
    return weights + (trained * 12 + total * size if states else 0)


def hash_together(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below ``folder`` by relative path; the ranks sync and hash disjoint parts.

    Collective.
    """
    sizes = ranks.broadcast(
        {name: (folder / name).stat().st_size for name in files_below(folder)} if ranks.is_main() else None
    )
    mine = shard_files(sizes, ranks.rank(), ranks.world_size())
    with rank_storage_errors(folder):
        for name in mine:
            sync(folder / name)
        hashes = hash_files([folder / name for name in mine])
    shards = ranks.gather({name: hashes[folder / name] for name in mine})
    return {name: sha256 for shard in shards for name, sha256 in shard.items()}


def check_pickles(folder: Path) -> None:
    """Read every file that DeepSpeed will unpickle with a reader that builds no objects. Collective.

    Raises :class:`CheckpointError` for a file that holds more than tensors and plain values.
    """
    files = sorted(folder.rglob("*.pt"))
    for file in files[ranks.rank() :: ranks.world_size()]:
        read_state_file(file)
    ranks.barrier()


@contextlib.contextmanager
def rank_storage_errors(path: Path) -> Iterator[None]:
    """Turn an error of the disk that only this rank meets into one that names ``path`` and is reported by this rank."""
    with ranks.tag_rank_errors(), storage_errors(path):
        yield
