"""Find the folders of a run that W&B wrote offline, and the command that uploads them."""

from __future__ import annotations

import re
import shlex
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cogflow.errors import CogflowError
from cogflow.files.record_io import read_record
from cogflow.records.history_records import current_line
from cogflow.records.run_records import RunToken
from cogflow.runtime.console import echo

WANDB = "wandb"
"""Folder of a run with W&B's files."""

NO_LINE = ("prepare", "benchmark")
"""Stages whose results do not depend on a line of the run's history."""

QUIET_SECONDS = 60.0
"""A file that was not written for so long belongs to a process that has ended: W&B writes the system's metrics every
15 s.
"""

_LINE = re.compile(r"(?P<stage>[a-z]+)(-line(?P<line>\d+))?(-offline)?")

# A .wandb file has a header and then LevelDB's log format: blocks of 32 KiB with chunks of crc32, length, kind, bytes.
_HEADER = 7
_BLOCK = 32768
_FULL, _LAST = 1, 4


@dataclass(frozen=True)
class _Records:
    """Number of complete records at the beginning of a file, and where the last of them ends.

    ``damaged``: what follows is not a record that was being written.
    """

    count: int
    end: int
    damaged: bool = False


@dataclass(frozen=True)
class _Session:
    """The .wandb file of one process. ``ended``: no process writes to it."""

    file: Path
    ended: bool


def run_id(token: str, stage: str, line: int) -> str:
    """Return the id of the W&B run of a stage and a line of a run folder, whose random name is ``token``."""
    return f"{token}-{stage}" if line == 1 or stage in NO_LINE else f"{token}-{stage}-line{line}"


@contextmanager
def one_upload_line(folder: Path) -> Iterator[None]:
    """Print how to upload W&B's offline folders of the run in ``folder`` once at the end, not after each stage."""
    global _held
    _held = []
    try:
        yield
    finally:
        held, _held = _held, None
        if held:
            echo_upload(folder)


_held: list[Path] | None = None


def echo_upload(folder: Path) -> None:
    """Print the command that uploads W&B's offline folders, after removing what would stop it."""
    if _held is not None:
        _held.append(folder)
        return
    try:
        repair_ended(folder)
        command = sync_command(folder)
    except OSError as error:
        echo(f"warning: W&B's offline folders cannot be read: {error}")
        return
    if command:
        echo(f"W&B offline; to upload this run: {command}")


def sync_command(folder: Path) -> str:
    """Return the command line that uploads every offline folder of the run's current line that is not uploaded yet.

    Empty when there is none. ``wandb sync`` uploads several W&B runs side by side, but those of one run in the order of
    their start. A stage's inputs must be uploaded by the stage that made them first, or W&B would take the user for
    their maker; so the stages follow one another.
    """
    runs: dict[str, list[str]] = {}
    for session in _unsynced(folder):
        runs.setdefault(session.file.stem, []).append(str(session.file.parent.resolve()))
    return " && ".join(shlex.join([*_sync_words(), *folders]) for folders in runs.values())


def unsynced_folders(folder: Path) -> list[Path]:
    """Return the offline folders of the current line of the run in ``folder`` that are not uploaded, oldest first."""
    return [session.file.parent.resolve() for session in _unsynced(folder)]


def repair_ended(folder: Path) -> None:
    """Remove cut off records from the offline folders that :func:`sync_command` names and that no process writes."""
    for session in _unsynced(folder):
        if session.ended:
            drop_incomplete_record(session.file)


def drop_incomplete_record(file: Path) -> int:
    """Remove a record that a kill has cut off from the end of a ``.wandb`` file; return the number of bytes removed.

    ``wandb sync`` stops at such a record and then uploads no later folder of the run. Nothing may write to the file.
    """
    records, size = _read_records(file), file.stat().st_size
    if records.damaged or not records.count or records.end == size:
        return 0
    with file.open("r+b") as opened:
        opened.truncate(records.end)
    return size - records.end


def _unsynced(folder: Path) -> list[_Session]:
    """Return the sessions of the current line that are not uploaded, oldest first.

    ``wandb sync`` marks what it has uploaded. It refuses a file of a session that was killed before it wrote its run,
    together with all others, so such files are left out.
    """
    try:
        token, line = read_record(folder / WANDB / RunToken.file_name, RunToken).id, current_line(folder)
    except CogflowError:
        return []
    files = sorted((folder / WANDB).glob("offline-run-*/run-*.wandb"), key=_start)
    files = [file for file in files if _belongs(file.stem.removeprefix("run-"), token, line)]
    newest = {file.name: file for file in files}
    found = []
    for file in files:
        # A later process continues its W&B run, or it is old.
        ended = file != newest[file.name] or time.time() - file.stat().st_mtime > QUIET_SECONDS
        empty = ended and _read_records(file).count < 2
        if not empty and not Path(f"{file}.synced").exists():
            found.append(_Session(file, ended))
    return found


def _start(file: Path) -> tuple[str, float]:
    """Return a key that sorts sessions: the second in the folder's name, then the time of the last record."""
    return file.parent.name[: len("offline-run-20260101_000000")], file.stat().st_mtime


def _belongs(identity: str, token: str, line: int) -> bool:
    """Return whether a W&B run is one of the run ``token`` and of ``line``, or of a stage without lines."""
    if not identity.startswith(f"{token}-"):
        return False
    name = _LINE.fullmatch(identity.removeprefix(f"{token}-"))
    return name is not None and (name["stage"] in NO_LINE or int(name["line"] or 1) == line)


def _sync_words() -> list[str]:
    """Return the words before the folders. W&B sorts the folders of one run by their start.

    Older versions, such as 0.28, continue a run only with ``--append``; later ones read in the files that it was
    resumed.
    """
    try:
        from wandb.proto.wandb_internal_pb2 import RunRecord

        return ["wandb", "sync"] if "resume" in RunRecord.DESCRIPTOR.fields_by_name else ["wandb", "sync", "--append"]
    except ImportError:
        return ["wandb", "sync"]


def _read_records(file: Path) -> _Records:
    """Count the complete records of a ``.wandb`` file, up to the first that is cut off or damaged."""
    data = file.read_bytes() if file.is_file() else b""
    at, count, end = _HEADER, 0, 0
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:  # the rest of a block is too short for a chunk
            at += _BLOCK - at % _BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        start, at = at, at + _HEADER + length
        if at > len(data):
            break
        if zlib.crc32(data[start + _HEADER - 1 : at]) != checksum:
            return _Records(count, end, damaged=len(data) - start > _BLOCK)
        if kind in (_FULL, _LAST):
            count, end = count + 1, at
    return _Records(count, end)
