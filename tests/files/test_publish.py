"""Test that readers see the old artefact or the new one, complete, whatever happens to the writer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cogflow.errors import StorageError
from cogflow.files import publish
from cogflow.files.atomic_write import remove_leftovers, require_space, write_first, write_json, write_text
from cogflow.files.publish import check_manifest, publish_folder


def fill(target: Path, text: str, *, replace: bool = False) -> None:
    with publish_folder(target, replace=replace) as folder:
        (folder / "sub").mkdir()
        (folder / "a.txt").write_text(text)
        (folder / "sub" / "b.txt").write_text(text * 2)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_complete_with_its_manifest(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with publish_folder(target) as folder:
        (folder / "a.txt").write_text("one")
        assert folder.parent == target.parent and folder.name.startswith(".target.partial-")
        assert not target.exists()
    assert entries(target.parent) == ["target"]
    assert json.loads((target / "manifest.json").read_text())["files"].keys() == {"a.txt"}
    assert check_manifest(target) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with publish_folder(tmp_path / "target") as folder:
            (folder / "a.txt").write_text("one")
            raise error

    with pytest.raises(error):
        fail()
    assert entries(tmp_path) == []


def test_an_exception_keeps_the_old_folder(tmp_path: Path) -> None:
    fill(tmp_path / "target", "old")

    def fail() -> None:
        with publish_folder(tmp_path / "target", replace=True) as folder:
            (folder / "a.txt").write_text("new")
            raise ValueError("no value")

    with pytest.raises(ValueError, match="no value"):
        fail()
    assert entries(tmp_path) == ["target"]
    assert (tmp_path / "target" / "a.txt").read_text() == "old" and check_manifest(tmp_path / "target") == []


def test_without_replace_an_existing_target_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "target", "old")
    with pytest.raises(StorageError, match="exists already"):
        fill(tmp_path / "target", "new")
    assert (tmp_path / "target" / "a.txt").read_text() == "old"


@pytest.mark.parametrize("exchange", [True, False])
def test_replace_keeps_the_old_folder_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    target = tmp_path / "target"
    fill(target, "old")
    if not exchange:
        monkeypatch.setattr(publish, "_exchange", lambda one, other: False)
    with publish_folder(target, replace=True) as folder:
        (folder / "a.txt").write_text("new")
        assert (target / "a.txt").read_text() == "old" and check_manifest(target) == []
    assert entries(tmp_path) == ["target"] and entries(target) == ["a.txt", "manifest.json"]
    assert (target / "a.txt").read_text() == "new" and check_manifest(target) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from cogflow.files import publish
phase, target = sys.argv[1], Path(sys.argv[2])
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
if phase == "manifest": publish.write_manifest = die
if phase == "sync": publish.sync_tree = die
if phase == "after": publish.remove = die
if phase == "between":
    publish._exchange = lambda one, other: False
    real = os.rename
    def rename(a, b):
        if ".partial-" in str(a): die()
        real(a, b)
    os.rename = rename
with publish.publish_folder(target, replace=True) as folder:
    (folder / "a.txt").write_text("new")
    if phase == "write": die()
"""


@pytest.mark.parametrize("phase", ["write", "manifest", "sync", "between", "after"])
def test_a_kill_leaves_the_old_folder_or_the_new_one(tmp_path: Path, phase: str) -> None:
    target = tmp_path / "target"
    fill(target, "old")
    process = subprocess.run([sys.executable, "-c", KILLED, phase, str(target)], check=False)
    assert process.returncode == -signal.SIGKILL
    if phase == "between":
        # The file system cannot exchange names: the old folder has a hidden name until the next writer comes.
        assert not target.exists()
        remove_leftovers(target)
    assert (target / "a.txt").read_text() == ("new" if phase == "after" else "old")
    assert check_manifest(target) == []
    fill(target, "next", replace=True)
    assert entries(tmp_path) == ["target"]


def test_leftovers_of_living_writers_and_of_others_stay(tmp_path: Path) -> None:
    for name in (f".target.partial-{os.getppid()}", ".other.partial-999999999", "target.partial-999999999"):
        (tmp_path / name).mkdir()
    fill(tmp_path / "target", "one")
    assert len(entries(tmp_path)) == 4


def test_text_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    write_text(path, "grün")
    assert path.read_bytes() == "grün".encode() and entries(path.parent) == ["a.txt"]

    def no_rename(*names: object) -> None:
        raise ValueError("no rename")

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(ValueError, match="no rename"):
        write_text(path, "new")
    assert path.read_text("utf-8") == "grün" and entries(path.parent) == ["a.txt"]


def test_json_is_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"nan": float("nan"), "inf": [float("inf"), 1.5], "path": tmp_path, "true": True})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "nan": None,
        "inf": [None, 1.5],
        "path": str(tmp_path),
        "true": True,
    }


FULL = """
import resource, sys
from pathlib import Path
from cogflow.errors import StorageError
from cogflow.files.atomic_write import write_text
from cogflow.files.publish import publish_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
kind, target = sys.argv[1], Path(sys.argv[2])
try:
    if kind == "text":
        write_text(target, "x" * 10_000)
    elif kind == "manifest":
        with publish_folder(target, replace=True) as folder:
            for index in range(100): (folder / f"{index}.txt").write_text("new")
    else:
        with publish_folder(target, replace=True) as folder:
            (folder / "a.txt").write_text("x" * 10_000)
except StorageError as error:
    print(error.exit_code, error)
"""


@pytest.mark.parametrize("kind", ["text", "folder", "manifest"])
def test_a_full_disk_names_the_path_and_keeps_the_old_content(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "text":
        write_text(target, "old")
    else:
        fill(target, "old")
    process = subprocess.run(
        [sys.executable, "-c", FULL, kind, str(target)], capture_output=True, text=True, check=True
    )
    assert process.stdout.startswith("2 ") and str(target) in process.stdout and "GB free" in process.stdout
    assert entries(tmp_path) == ["target"]
    assert (target if kind == "text" else target / "a.txt").read_text() == "old"
    assert kind == "text" or check_manifest(target) == []


def test_a_full_disk_behind_another_exception_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="target"), publish_folder(tmp_path / "target"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_file_in_the_way_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        fill(tmp_path / "file" / "target", "new")
    with pytest.raises(StorageError, match="file"):
        write_text(tmp_path / "file" / "a.txt", "new")


def test_other_errors_are_raised_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), publish_folder(tmp_path / "target"):
        (tmp_path / "nowhere").read_text()


def test_too_little_space_is_refused(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(StorageError, match="not/there needs 1000000000.00 GB"):
        require_space(tmp_path / "not" / "there", 10**18)


def test_write_first_keeps_the_first_text(tmp_path: Path) -> None:
    write_first(tmp_path / "job" / "code", "2")
    write_first(tmp_path / "job" / "code", "3")
    assert (tmp_path / "job" / "code").read_text() == "2"
