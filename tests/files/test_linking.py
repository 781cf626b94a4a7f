"""Large files in a second place: what was made is what is said, and a copy that is not the source is refused."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from cogflow.errors import StorageError
from cogflow.files import hashing, linking
from cogflow.files.hashing import hash_files
from cogflow.files.linking import can_link, place_file

DATA = os.urandom(9_000_001)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(linking, "_reflink", lambda source, target: False)


def test_a_link_shares_its_bytes(source: Path, tmp_path: Path) -> None:
    how = place_file(source, tmp_path / "target", "auto", SHA256)
    assert how in ("reflink", "hard") and (tmp_path / "target").read_bytes() == DATA
    assert os.path.samefile(source, tmp_path / "target") == (how == "hard")
    assert can_link(source, tmp_path) and sorted(path.name for path in tmp_path.iterdir()) == [
        "source.safetensors",
        "target",
    ]


def test_a_reflink_comes_first_where_the_file_system_has_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    asked = []

    def clone(target: int, request: int, origin: int) -> int:
        asked.append(request)
        os.sendfile(target, origin, 0, len(DATA))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    assert place_file(source, tmp_path / "target", "auto", SHA256) == "reflink" and asked == [0x40049409]
    assert (tmp_path / "target").read_bytes() == DATA and source.stat().st_nlink == 1


def test_a_copy_is_one(source: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    assert place_file(source, tmp_path / "target", "copy", SHA256, lambda count, name: seen.append(count)) == "copy"
    assert source.stat().st_nlink == 1 and (tmp_path / "target").read_bytes() == DATA and sum(seen) == len(DATA)


def test_without_links_auto_copies_and_hard_says_why(source: Path, tmp_path: Path, no_links: None) -> None:
    assert place_file(source, tmp_path / "one", "auto", SHA256) == "copy"
    with pytest.raises(StorageError, match=r"(?s)cannot be hard-linked .*stage\.link=copy") as caught:
        place_file(source, tmp_path / "two", "hard", SHA256)
    assert caught.value.exit_code == 2 and not (tmp_path / "two").exists() and not can_link(source, tmp_path)


def test_a_source_that_changes_on_the_way_is_refused(source: Path, tmp_path: Path) -> None:
    source.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))
    with pytest.raises(StorageError, match="changed while it was copied"):
        place_file(source, tmp_path / "target", "copy", SHA256)


def test_many_files_are_hashed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "PIECE", 1000)
    paths = [tmp_path / str(number) for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(DATA[: number * 997])
    told: dict[str, int] = {}
    found = hash_files(paths, lambda count, name: told.update({name: told.get(name, 0) + count}))
    assert found == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert told == {path.name: path.stat().st_size for path in paths if path.stat().st_size}


def test_a_file_that_cannot_be_read_stops_the_others(tmp_path: Path, source: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        hash_files([source, tmp_path / "folder"])
