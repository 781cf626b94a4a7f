"""Test that a run folder has one writer: with other processes, hosts, namespaces, copies, and several challengers."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from cogflow.errors import RunInUse
from cogflow.files.record_io import read_record, record_values
from cogflow.records.run_records import LockRecord
from cogflow.runtime import run_lock
from cogflow.runtime.heartbeat import enter_phase
from cogflow.runtime.run_lock import RunLock, hold_run

FORK = multiprocessing.get_context("fork")


@contextmanager
def holder(run: Path) -> Iterator[int]:
    """Fork a process that holds the lock of ``run`` and renews it often; return its process id."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        run_lock.RENEW_SECONDS = 0.05
        with hold_run(run, "the command of the holder"):
            os.write(write, b"held")
            time.sleep(120)
        os._exit(0)
    try:
        assert os.read(read, 4) == b"held"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)


def lock_file(run: Path) -> Path:
    [path] = (run / "lock").glob("*.json")
    return path


def record(run: Path) -> LockRecord:
    return read_record(lock_file(run), LockRecord)


def write_lock(run: Path, number: int = 1, **values: Any) -> Path:
    """Write a lock of a living process of this machine; ``values`` replace fields."""
    path = run / "lock" / f"{number:06d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    known = LockRecord(
        host=os.uname().nodename,
        boot=run_lock._boot_id(),
        pid_namespace=run_lock._pid_namespace(),
        pid=os.getppid(),
        process_start=run_lock.process_start(os.getppid()),
        inode=path.stat().st_ino,
        job=None,
        command="another command",
        since="2026-01-01T00:00:00Z",
    )
    path.write_text(json.dumps(record_values(known) | values))
    return path


def renew_lock(path: Path) -> None:
    """Change the lock file as a living holder on another machine would."""
    values = json.loads(path.read_text())
    with path.open("r+") as file:
        file.write(json.dumps(values | {"renewals": values["renewals"] + 1}))


def hold(run: Path) -> float:
    """Take and release the lock; return the seconds until it was taken."""
    started = time.monotonic()
    with hold_run(run, "this command"):
        return time.monotonic() - started


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the times: a lock without renewals is stale after a second."""
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "OBSERVED_SECONDS", 1.0)


def test_a_second_process_is_refused_and_the_holder_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with holder(run) as pid:
        with pytest.raises(RunInUse) as refused:
            hold(run)
        assert record(run).pid == pid and not record(run).released
    text = str(refused.value)
    assert refused.value.exit_code == 2
    for part in (f"process {pid} on {os.uname().nodename}", "SLURM job 4711", record(run).since):
        assert part in text
    for part in ("the command of the holder", "scancel 4711", "run.name=NEW", "--dependency=singleton"):
        assert part in text


def test_a_killed_holder_is_replaced_at_once(run: Path) -> None:
    with holder(run) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # a zombie: its parent has not collected it
        assert hold(run) < 0.5
    assert record(run).released and record(run).pid == os.getpid()


def test_a_stopped_holder_on_this_machine_keeps_its_lock(run: Path, soon: None) -> None:
    with holder(run) as pid:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.2)
        with pytest.raises(RunInUse):
            hold(run)


def test_another_process_with_the_same_pid_does_not_hold_the_lock(run: Path) -> None:
    start = run_lock.process_start(os.getppid())
    assert start is not None
    write_lock(run, process_start=start - 1)
    assert hold(run) < 0.5


@pytest.mark.parametrize("field", ["host", "boot", "pid_namespace"])
def test_a_process_that_cannot_be_looked_up_is_observed(run: Path, soon: None, field: str) -> None:
    """The pid of another host, boot or container says nothing here: neither that it lives nor that it is gone."""
    path = write_lock(run, 1, **{field: "another", "pid": 2**22 + 1})
    os.utime(path, (time.time() + 3600, time.time() + 3600))  # the clock of the other machine is an hour ahead
    assert 1.0 <= hold(run) < 2.0
    path = write_lock(run, 7, **{field: "another", "pid": 2**22 + 1})
    renewing = threading.Timer(0.3, renew_lock, [path])
    renewing.start()
    started = time.monotonic()
    with pytest.raises(RunInUse, match="writes into it since"):
        hold(run)
    assert time.monotonic() - started < 1.0, "one renewal is enough to know that it is held"
    renewing.join()


def test_a_lock_without_identity_is_observed(run: Path, soon: None) -> None:
    write_lock(run, boot=None)
    assert hold(run) >= 1.0


def test_a_copy_of_a_run_in_use_is_taken_over_after_the_observed_time(run: Path, soon: None) -> None:
    with holder(run):
        copy = run.parent / "copy"
        shutil.copytree(run, copy)
        assert 1.0 <= hold(copy) < 2.0
        with pytest.raises(RunInUse):
            hold(run)


def test_a_damaged_lock_file_is_taken_over_after_the_observed_time(run: Path, soon: None) -> None:
    write_lock(run, 3).write_text("{")
    assert hold(run) >= 1.0
    assert record(run).released and lock_file(run).name == "000004.json"


def test_the_clock_of_the_day_does_not_matter(run: Path, soon: None, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    write_lock(run, host="another")
    assert 1.0 <= hold(run) < 2.0


def test_a_process_may_hold_a_folder_several_times(run: Path) -> None:
    with hold_run(run, "outer"):
        with hold_run(run.parent / "run" / ".." / "run", "inner"):
            assert not record(run).released
        assert not record(run).released
    assert record(run).released and record(run).command == "outer"


def test_an_error_releases_the_lock(run: Path) -> None:
    def fail() -> None:
        with hold_run(run, "this command"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert record(run).released and hold(run) < 0.5


def test_a_folder_made_for_the_lock_is_removed_with_it(tmp_path: Path) -> None:
    with hold_run(tmp_path / "new", "this command"):
        assert (tmp_path / "new/lock/000001.json").is_file()
    assert not (tmp_path / "new").exists()
    with hold_run(tmp_path / "new", "this command"):
        (tmp_path / "new/result").touch()
    assert record(tmp_path / "new").released


def test_a_forked_child_neither_holds_nor_releases_the_lock(run: Path) -> None:
    def child() -> None:
        try:
            hold(run)
        except RunInUse:
            os._exit(7)

    with hold_run(run, "this command"):
        process = FORK.Process(target=child)
        process.start()
        process.join()
        assert process.exitcode == 7, "the parent holds it"
        assert not record(run).released and record(run).pid == os.getpid()
        lock = run_lock._held[run.resolve()]
        renewals = record(run).renewals
        assert lock.renew() and record(run).renewals == renewals + 1


@pytest.fixture
def held_lock(run: Path, soon: None) -> Iterator[tuple[RunLock, list[int]]]:
    """Return a lock that this process holds, and the exit codes with which it would have ended."""
    ended: list[int] = []
    lock = RunLock(run, "this command", end=ended.append)
    lock.acquire()
    yield lock, ended
    lock.release()


def steal(run: Path) -> None:
    write_lock(run, 2, host="another")


def remove_lock(run: Path) -> None:
    shutil.rmtree(run / "lock")


def move_run(run: Path) -> None:
    run.rename(run.parent / "moved")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (steal, f"taken over by process {os.getppid()} on another"),
        (remove_lock, "was removed"),
        (move_run, "was removed"),
    ],
)
def test_a_holder_that_lost_its_lock_ends(
    run: Path,
    held_lock: tuple[RunLock, list[int]],
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    reason: str,
) -> None:
    lock, ended = held_lock
    time.sleep(0.3)
    assert ended == [] and record(run).renewals > 0
    change(run)
    time.sleep(0.5)
    assert ended == [RunInUse.exit_code]
    assert reason in capsys.readouterr().err
    lock.release()
    if change is steal:
        assert read_record(run / "lock/000002.json", LockRecord).host == "another", "the new holder's file is unchanged"


def test_a_process_that_was_paused_ends_before_its_next_phase(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that renews may run later than the work that goes on."""
    ended: list[int] = []
    lock = RunLock(run, "this command", end=ended.append)
    lock.acquire()
    monkeypatch.setitem(run_lock._held, run.resolve(), lock)
    steal(run)
    enter_phase("step 1: forward")
    assert ended == [], "a lock that was renewed a moment ago is not read again"
    lock.renewed_at -= 100
    enter_phase("step 1: saving")
    assert ended == [2]
    lock.release()


def test_a_full_disk_does_not_end_the_holder(
    run: Path, held_lock: tuple[RunLock, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    time.sleep(0.5)
    assert held_lock[1] == []


def test_a_file_system_without_hard_links_will_do(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    with hold_run(run, "this command"):
        assert record(run).pid == os.getpid() and [path.name for path in (run / "lock").iterdir()] == ["000001.json"]
        assert record(run).inode == lock_file(run).stat().st_ino


def challenge(run: Path, start: Barrier, end: Barrier, rounds: int, seed: int) -> None:
    """Take the lock in each round at the same time as others, and write who had it."""
    run_lock.OBSERVED_SECONDS = 0.05
    for number in range(rounds):
        folder = run / str(number)
        start.wait(60)
        try:
            with hold_run(folder, f"challenger {seed}"):
                (folder / f"winner-{seed}").touch()
                end.wait(60)
        except RunInUse:
            end.wait(60)


@pytest.mark.parametrize("left", ["dead", "foreign", "nothing", "released"])
def test_one_of_several_challengers_takes_a_free_lock(tmp_path: Path, left: str) -> None:
    rounds, challengers = 40, 4
    values: dict[str, dict[str, Any]] = {
        "dead": {"pid": 2**22 + 1},
        "foreign": {"host": "another"},
        "released": {"released": True},
    }
    for number in range(rounds):
        (tmp_path / str(number)).mkdir()
        if left in values:
            write_lock(tmp_path / str(number), 5, **values[left])
    start, end = FORK.Barrier(challengers), FORK.Barrier(challengers)
    processes = [
        FORK.Process(target=challenge, args=(tmp_path, start, end, rounds, seed)) for seed in range(challengers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * challengers
    winners = [len(list((tmp_path / str(number)).glob("winner-*"))) for number in range(rounds)]
    assert winners == [1] * rounds


def take_turns(run: Path, seconds: float, seed: int) -> None:
    """Hold the lock again and again; exit with 9 when another process holds it at the same time."""
    deadline, taken = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        try:
            with hold_run(run, f"turn {seed}"):
                try:
                    marker = os.open(run / "marker", os.O_CREAT | os.O_EXCL)
                except FileExistsError:
                    os._exit(9)
                taken += 1
                os.close(marker)
                (run / "marker").unlink()
        except RunInUse:
            continue
    os._exit(0 if taken > 5 else 8)


def test_holders_never_overlap(run: Path) -> None:
    processes = [FORK.Process(target=take_turns, args=(run, 2.0, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list((run / "lock").iterdir())) == 1
