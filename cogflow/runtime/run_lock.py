"""Lock a run folder for one writer. It works on shared file systems, and never compares the clocks of two machines.

``<run>/lock/`` has one numbered file; the file with the highest number says who may write. A process takes the lock
when that file is released or stale: it creates the file with the next number, which succeeds for one process only, and
then removes the lower numbers. The highest number is never removed, so a slow process cannot create a number again that
was in use before: it then sees a higher one and has lost.

A thread of the holder rewrites the holder's file every :data:`RENEW_SECONDS`. The lock of a process that ran in the
same boot and process namespace is stale when that process is gone. Any other lock is stale when its file does not
change for :data:`OBSERVED_SECONDS` on the monotonic clock of the process that waits for it. A holder that finds a
higher number ends at once, because another process writes into the folder now.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogflow.errors import CogflowError, RunInUse
from cogflow.files.atomic_write import storage_errors
from cogflow.files.printable import paragraph
from cogflow.files.record_io import parse_record, record_values
from cogflow.records.run_records import LockRecord
from cogflow.runtime import ranks
from cogflow.runtime.console import echo

FOLDER = "lock"
RENEW_SECONDS = 5.0
OBSERVED_SECONDS = 90.0
"""Seconds without a renewal after which the lock of a process on another machine is stale.

It is longer than any pause of a living process that was seen: a thread cannot run while a library writes a large file
and keeps Python's interpreter lock.
"""
SPARE_BYTES = 32
"""Blanks at the end of a lock file: it is rewritten in place with the same length, while its numbers grow."""

_NAME = re.compile(r"(\d{6,})\.json")
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


@contextlib.contextmanager
def hold_run(folder: Path, command: str) -> Iterator[None]:
    """Hold the lock of the run ``folder`` inside the block. Rank 0 takes it for all ranks. Collective.

    A process may hold the same folder several times at once. ``command``: what the user typed, for the message of
    others.

    Raises :class:`RunInUse` on every rank while another process holds it, and :class:`StorageError` when the lock
    cannot be written.
    """
    ranks.run_on_main(lambda: _acquire(folder, command))
    try:
        yield
    finally:
        if ranks.is_main():
            _release(folder)


def end_if_lost() -> None:
    """End this process when it was stopped for so long that another one may have taken one of its locks.

    It reads files only when the last renewal is long ago: when a process continues after a pause, the next statement of
    its work may run before the thread that renews.
    """
    for lock in list(_held.values()):
        if time.monotonic() - lock.renewed_at > 3 * RENEW_SECONDS:
            lock.renew()


class RunLock:
    """The lock of one run folder. ``end``: ends this process when the lock is lost; tests replace it."""

    def __init__(self, folder: Path, command: str, end: Callable[[int], Any] = os._exit) -> None:
        self.folder, self.path = folder / FOLDER, Path()
        self.renewed_at = 0.0
        self.entries = 1  # blocks of hold_run that are open
        self._run, self._command, self._end = folder, command, end
        self._number, self._size, self._descriptor = 0, 0, -1
        self._made_folder = False
        self._record: LockRecord | None = None
        self._busy = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock and start to renew it. Raises :class:`RunInUse` while another process holds it."""
        self._made_folder = not self._run.exists()
        taken = False
        with storage_errors(self.folder):
            while not taken:
                self.folder.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # its former holder removes the folder it made
                    taken = self._create(self._wait_until_free() + 1)
            self._remove_others()
        self._thread.start()

    def renew(self) -> bool:
        """Rewrite the lock file; return whether this process still holds the lock. Otherwise end the process."""
        if not self._busy.acquire(blocking=False):  # another thread renews it at this moment
            return True
        try:
            if self._descriptor < 0 or self._record is None:
                return True
            if self._is_lost():
                self._report_loss()
                return False
            self._record = replace(self._record, renewals=self._record.renewals + 1)
            with contextlib.suppress(OSError):  # a full or slow disk is no reason to end
                self._write(self._descriptor, self._record)
            self.renewed_at = time.monotonic()
            return True
        finally:
            self._busy.release()

    def release(self) -> None:
        """Mark the lock as released, so that the next process takes it at once.

        Remove a run folder that was made for the lock and holds nothing else.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._busy:
            if self._descriptor < 0 or self._record is None:
                return
            with contextlib.suppress(OSError):
                self._write(self._descriptor, replace(self._record, released=True))
            os.close(self._descriptor)
            self._descriptor = -1
            if self._made_folder:
                self._remove_empty_folder()

    def forget(self) -> None:
        """Close the file without releasing it, in a forked child."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _keep_renewing(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            if not self.renew():
                return

    def _remove_empty_folder(self) -> None:
        with contextlib.suppress(OSError):
            if [path.name for path in self._run.iterdir()] == [FOLDER] and _numbers(self.folder) == [self._number]:
                self.path.unlink()
                self.folder.rmdir()
                self._run.rmdir()

    def _is_lost(self) -> bool:
        try:
            numbers = _numbers(self.folder)
        except OSError as error:
            return error.errno in _VANISHED
        return self._number not in numbers or max(numbers) != self._number

    def _report_loss(self) -> None:
        holder = "its lock was removed"
        with contextlib.suppress(OSError):
            found = _newest(self.folder)
            if found.number > self._number:
                holder = f"its lock was taken over by {found.record.holder if found.record else 'another process'}"
        sys.stdout.flush()
        message = (
            f"error: {self._run} may not be written by this process any more: {holder}. This process ends now. It did "
            f"not renew {self.path} in time, or somebody changed {self.folder}."
        )
        print(paragraph(message), file=sys.stderr, flush=True)
        self._end(RunInUse.exit_code)

    def _wait_until_free(self) -> int:
        """Return the number of the newest lock when it is released or stale. Raises :class:`RunInUse` otherwise."""
        first = found = _newest(self.folder)
        started = time.monotonic()
        announced = False
        while not found.is_free():
            if found.is_held() or found.content != first.content:
                raise self._in_use(found.record)
            left = OBSERVED_SECONDS - (time.monotonic() - started)
            if left <= 0:
                who = found.record.holder if found.record else "an unknown process"
                echo(f"the lock of {self._run} was not renewed in {OBSERVED_SECONDS:g} s; it is taken over from {who}")
                break
            if not announced and found.record is not None and left < OBSERVED_SECONDS - RENEW_SECONDS / 2:
                announced = True
                echo(f"waiting up to {left:.0f} s to see whether {found.record.holder} still writes into {self._run}")
            time.sleep(min(left, RENEW_SECONDS / 5))
            found = _newest(self.folder)
        return found.number

    def _in_use(self, record: LockRecord | None) -> RunInUse:
        if record is None:
            return RunInUse(f"{self._run} is in use by another process.", "Wait until it ends, or set run.name=NEW.")
        end = f"scancel {record.job}" if record.job else f"kill {record.pid} on {record.host}"
        later = " To start a SLURM job after it: sbatch --dependency=singleton." if record.job else ""
        return RunInUse(
            f"{self._run} is in use: {record.holder} writes into it since {record.since} ({record.command}).",
            f"Wait until it ends, end it ({end}), or use another folder: run.name=NEW.{later}",
        )

    def _create(self, number: int) -> bool:
        """Create the lock file ``number``, complete from the first moment; return whether this process has the lock."""
        path = self.folder / f"{number:06d}.json"
        hidden = self.folder / f".{secrets.token_hex(8)}"
        descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            self._fill(descriptor)
            if not _link(hidden, path, descriptor):
                # A file system without hard links: others may read the file before it is filled. They then wait.
                exclusive = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                os.close(descriptor)
                descriptor = exclusive
                self._fill(descriptor)
            has_lock = max(_numbers(self.folder)) == number
        except (FileExistsError, FileNotFoundError):  # another process was faster, and removed the hidden file
            has_lock = False
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            hidden.unlink(missing_ok=True)
        if not has_lock:
            os.close(descriptor)
            return False
        self.path, self._number, self._descriptor = path, number, descriptor
        self.renewed_at = time.monotonic()
        return True

    def _fill(self, descriptor: int) -> None:
        """Write the record of this process to a new lock file."""
        self._record = LockRecord(
            host=socket.gethostname(),
            boot=_boot_id(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            process_start=process_start(os.getpid()),
            inode=os.fstat(descriptor).st_ino,
            job=os.environ.get("SLURM_JOB_ID"),
            command=self._command,
            since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        self._size = len(_encode(self._record)) + SPARE_BYTES
        self._write(descriptor, self._record)

    def _write(self, descriptor: int, record: LockRecord) -> None:
        os.pwrite(descriptor, _encode(record).ljust(self._size - 1) + b"\n", 0)
        os.fdatasync(descriptor)  # a network file system would keep it on this machine for a while

    def _remove_others(self) -> None:
        """Remove lower numbers, and hidden files of processes that were killed while they created a lock."""
        for entry in list(self.folder.iterdir()):
            match = _NAME.fullmatch(entry.name)
            if (match and int(match[1]) < self._number) or entry.name.startswith("."):
                with contextlib.suppress(OSError):
                    entry.unlink()


@dataclass(frozen=True)
class _Found:
    """Newest lock file of a folder; number 0 and no content when there is none."""

    number: int
    content: bytes
    inode: int
    record: LockRecord | None

    def is_free(self) -> bool:
        """Return whether the lock is released, or its process ran on this machine and is gone."""
        if self.number == 0:
            return True
        if self.record is None:
            return False
        return self.record.released or (self._is_local() and not self._process_lives())

    def is_held(self) -> bool:
        """Return whether the lock's process lives on this machine and holds this folder, not the original of it."""
        return self.record is not None and self._is_local() and self.inode == self.record.inode

    def _is_local(self) -> bool:
        """Return whether the process can be looked up here: same host, same boot, same process namespace."""
        ids = (_boot_id(), _pid_namespace())
        record = self.record
        if record is None or None in ids or record.process_start is None:
            return False
        return (record.host, record.boot, record.pid_namespace) == (socket.gethostname(), *ids)

    def _process_lives(self) -> bool:
        return self.record is not None and process_start(self.record.pid) == self.record.process_start


def process_start(pid: int) -> int | None:
    """Return the start of a process in clock ticks since the boot; None when it has ended or cannot be looked up.

    A zombie has ended.
    """
    try:
        # Field 2 of /proc/PID/stat, a name, may hold spaces: split after it. Field 3 is the state, field 22 the start.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() or None
    except OSError:
        return None


def _pid_namespace() -> str | None:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _numbers(folder: Path) -> list[int]:
    """Return the numbers of the lock files in ``folder``. Raises ``OSError``."""
    matches = [_NAME.fullmatch(name) for name in os.listdir(folder)]  # noqa: PTH208 - one system call
    return sorted(int(match[1]) for match in matches if match)


def _newest(folder: Path) -> _Found:
    """Return the lock file with the highest number. Raises ``OSError``."""
    while True:
        numbers = _numbers(folder)
        if not numbers:
            return _Found(0, b"", 0, None)
        path = folder / f"{numbers[-1]:06d}.json"
        try:
            with path.open("rb") as file:  # opening makes a network file system read the server's state
                content, inode = file.read(), os.fstat(file.fileno()).st_ino
        except OSError as error:
            if error.errno in _VANISHED:  # another process has just taken a higher number
                continue
            raise
        record = None
        with contextlib.suppress(CogflowError):
            record = parse_record(content, LockRecord, str(path))
        return _Found(numbers[-1], content, inode, record)


def _link(hidden: Path, path: Path, descriptor: int) -> bool:
    """Give the file ``hidden`` the name ``path``, too. Return False where the file system has no hard links.

    Raises ``FileExistsError`` when ``path`` exists. A network file system may report that after its own success.
    """
    try:
        os.link(hidden, path)
    except FileExistsError:
        if os.fstat(descriptor).st_nlink == 2:
            return True
        raise
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            return False
        raise
    return True


def _encode(record: LockRecord) -> bytes:
    return json.dumps(record_values(record), indent=1).encode()


_held: dict[Path, RunLock] = {}
"""Locks of this process by the resolved path of their run folder."""


def _acquire(folder: Path, command: str) -> None:
    known = _held.get(folder.resolve())
    if known is not None:
        known.entries += 1
        return
    lock = RunLock(folder, command)
    lock.acquire()
    _held[folder.resolve()] = lock


def _release(folder: Path) -> None:
    lock = _held.get(folder.resolve())
    if lock is None:
        return
    lock.entries -= 1
    if lock.entries == 0:
        del _held[folder.resolve()]
        lock.release()


def _forget_in_child() -> None:
    """Drop the locks in a forked child: they are the parent's, which renews and releases them."""
    for lock in _held.values():
        lock.forget()
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
