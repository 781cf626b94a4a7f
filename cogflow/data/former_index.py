"""Keep the index of clips that a run was trained on when ``stage=prepare`` replaces it.

``cache/former/`` holds one index for each set of clips that a checkpoint of the run was trained on. The shards that it
names stay in ``cache/``, so that training can go on with these clips.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cogflow.artifacts.run_layout import step_folders, step_of
from cogflow.errors import UserError
from cogflow.files.record_io import read_record
from cogflow.records.cache_records import CacheIndex
from cogflow.records.training_records import TrainerRecord

FORMER = "former"
"""Folder of the former indexes, in the folder of the cache."""
_NAME_LENGTH = 20  # characters of a fingerprint in a file's name


def keep_index(folder: Path, index: CacheIndex) -> None:
    """Move the index of the cache in ``folder`` to the former ones."""
    target = _former_file(folder, index.fingerprint)
    target.parent.mkdir(exist_ok=True)
    (folder / CacheIndex.file_name).replace(target)


def read_former(folder: Path, fingerprint: str) -> CacheIndex | None:
    """Return the former index of the cache in ``folder`` with ``fingerprint``; None where there is none."""
    path = _former_file(folder, fingerprint)
    if not path.is_file():
        return None
    index = read_record(path, CacheIndex)
    return index if index.fingerprint == fingerprint else None


def former_shards(folder: Path) -> set[str]:
    """Return the names of the shards that the former indexes need.

    Raises :class:`~cogflow.errors.DataError` for an index that cannot be read: its shards would be removed.
    """
    paths = sorted((folder / FORMER).glob("*.json"))
    return {name for path in paths for name in index_shards(read_record(path, CacheIndex))}


def index_shards(index: CacheIndex) -> set[str]:
    """Return the names of the shards that ``index`` needs."""
    return {name for entry in index.entries for name in (entry.clip_shard, entry.text_shard)} | {index.empty.text_shard}


def trained_step(run: Path, fingerprint: str) -> int | None:
    """Return the last step that the run trained on the clips with ``fingerprint``; None where no checkpoint names them.

    A checkpoint that cannot be read counts: the clips may be its own.
    """
    steps = [step_of(folder) for folder in _checkpoints(run) if _trained_on(folder) in (None, fingerprint)]
    return max(steps, default=None)


def _checkpoints(run: Path) -> Iterator[Path]:
    """Yield the checkpoints and the saved weights of ``run``, also those of replaced lines of its history."""
    for place in (run, *sorted((run / "replaced").glob("*")), *sorted((run / "rolled-back").glob("*"))):
        for name in ("checkpoints", "weights"):
            yield from step_folders(place / name)


def _trained_on(checkpoint: Path) -> str | None:
    try:
        return str(read_record(checkpoint / TrainerRecord.file_name, TrainerRecord).identity.get("data"))
    except UserError:
        return None


def _former_file(folder: Path, fingerprint: str) -> Path:
    return folder / FORMER / f"{fingerprint[:_NAME_LENGTH]}.json"
