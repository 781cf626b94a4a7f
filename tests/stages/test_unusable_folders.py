"""Test that every stage refuses a folder that it cannot write, with one message, before it starts.

The stages run in this process. The table crosses them with what can be wrong with a folder.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cogflow import cli
from cogflow.errors import StorageError
from cogflow.files import usable_folder
from cogflow.files.usable_folder import require_usable
from cogflow.stages import SUMMARIES

OUTPUTS = ("sample", "export", "assemble", "diagnose")
"""Stages with stage.output."""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    subprocess.run(["umount", str(tmp_path / "disk")], check=False, capture_output=True)


def mount(place: Path, options: str) -> Path:
    disk = place / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    return disk


def file_in_its_place(place: Path) -> tuple[Path, str]:
    (place / "file").write_text("")
    return place / "file", f"{place}/file is a file"


def file_above(place: Path) -> tuple[Path, str]:
    (place / "file").write_text("")
    return place / "file/deep/run", f"{place}/file is a file"


def link_to_nothing(place: Path) -> tuple[Path, str]:
    (place / "link").symlink_to(place / "nothing")
    return place / "link", "which does not exist"


def long_name(place: Path) -> tuple[Path, str]:
    return place / ("n" * 300), "has 300 bytes"


def long_path(place: Path) -> tuple[Path, str]:
    return place.joinpath(*["n" * 200] * 20), "its path has"


def read_only(place: Path) -> tuple[Path, str]:
    return mount(place, "ro,size=4M") / "run", "is mounted read-only"


def full(place: Path) -> tuple[Path, str]:
    disk = mount(place, "size=2M")
    (disk / "file").write_bytes(bytes((2 << 20) - (16 << 10)))
    return disk / "run", "MB are free in"


def no_inode(place: Path) -> tuple[Path, str]:
    return mount(place, "size=4M,nr_inodes=1") / "run", "no inode is free"


SITUATIONS = [file_in_its_place, file_above, link_to_nothing, long_name, long_path, read_only, full, no_inode]


def refused(words: list[str], capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """Assert that the command ends with 2 and one message with ``parts``, before the stage is loaded."""
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("StorageError: ") == 1 and "Traceback" not in said
    assert [part for part in parts if part not in said] == []
    assert len(said.splitlines()) == 2, "what is wrong and where, and what would be right"


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise AssertionError(f"stage={name} is loaded")

    monkeypatch.setattr(cli, "load", load)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_stage_refuses_a_run_folder_that_it_cannot_write(
    place: Path, unloaded: None, capsys: pytest.CaptureFixture[str], situation: Callable[[Path], tuple[Path, str]]
) -> None:
    folder, part = situation(place)
    before = sorted(place.rglob("*"))
    for stage in SUMMARIES:
        refused([f"stage={stage}", f"run.root={folder.parent}", f"run.name={folder.name}"], capsys, part)
    assert sorted(place.rglob("*")) == before, "nothing is made"


@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_stage_refuses_an_output_folder_that_it_cannot_write(
    place: Path, unloaded: None, capsys: pytest.CaptureFixture[str], situation: Callable[[Path], tuple[Path, str]]
) -> None:
    folder, part = situation(place)
    key = ["stage.output"] if situation in (file_in_its_place, file_above, read_only, full, no_inode) else []
    for stage in OUTPUTS:
        refused([f"stage={stage}", f"run.root={place}/runs", f"stage.output={folder}"], capsys, part, *key)
    assert not (place / "runs").exists()


@pytest.mark.parametrize("name", cli.RUN_FOLDERS)
def test_a_run_folder_with_a_file_in_the_place_of_a_folder_is_refused(
    place: Path, unloaded: None, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (place / "run").mkdir()
    (place / "run" / name).write_text("")
    for stage in SUMMARIES if name == "ranks" else ("train",):
        refused([f"stage={stage}", f"run.root={place}", "run.name=run"], capsys, f"{place}/run/{name} is a file")


def test_a_plan_and_a_dry_run_write_nothing_and_need_no_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    class Ran:
        def run(self, config: Any) -> None:
            loaded.append(config.stage.name)

    monkeypatch.setattr(cli, "load", lambda name: Ran())
    (place / "file").write_text("")
    assert cli.main(["stage=train", "stage.plan=true", f"run.root={place}/file"]) == 0
    assert cli.main(["stage=export", "stage.dry_run=true", f"run.root={place}/file"]) == 0
    assert loaded == ["train", "export"]


LATE: list[tuple[BaseException, str]] = [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device (free: "),
    (OSError(errno.EFBIG, "File too large"), "File too large"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "os error 28"),
    (OSError(errno.EROFS, "Read-only file system", "{run}/metrics.jsonl"), "metrics.jsonl cannot be written"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "{run}/train.json"), "train.json cannot be written"),
    (PermissionError(errno.EACCES, "Permission denied", "{run}/cache/a"), "cache/a cannot be written"),
    (OSError(errno.EEXIST, "File exists", "{run}/a", None, "{run}/b"), "b cannot be written"),
]
"""Errors of the disk in the midst of a stage, and what the message says. ``{run}``: the run folder."""


@pytest.mark.parametrize(("error", "part"), LATE, ids=[type(error).__name__ + part[:20] for error, part in LATE])
def test_a_disk_error_in_the_midst_of_a_stage_is_one_message(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Any, part: str
) -> None:
    class Failing:
        def run(self, config: Any) -> None:
            if isinstance(error, OSError) and error.filename:
                error.filename = error.filename.format(run=place / "run")
                error.filename2 = error.filename2 and error.filename2.format(run=place / "run")
            raise error

    monkeypatch.setattr(cli, "load", lambda name: Failing())
    monkeypatch.setenv("RANK", "1")
    refused(["stage=train", f"run.root={place}", "run.name=run"], capsys, part, "rank 1: StorageError")


def test_a_refused_file_elsewhere_is_a_fault(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        def run(self, config: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere")

    monkeypatch.setattr(cli, "load", lambda name: Failing())
    assert cli.main(["stage=train", f"run.root={place}", "run.name=run"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_user_without_permission_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    (folder / "run/cache").mkdir(parents=True)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        for path in (folder / "run", folder / "new"):
            try:
                require_usable(path)
            except StorageError as error:
                os.write(write, f"{error.message}\n".encode())
        os._exit(0)
    os.waitpid(pid, 0)
    lines = os.read(read, 10000).decode().splitlines()
    shutil.rmtree(folder)
    os.close(read)
    os.close(write)
    assert len(lines) == 2
    assert f"{folder}/run cannot be written: you (" in lines[0] and "may not write there" in lines[0]
    assert f"{folder} cannot be written" in lines[1]


def test_a_file_system_that_tells_no_sizes_is_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usable_folder, "_free_bytes", lambda folder: None)
    require_usable(tmp_path / "run")
