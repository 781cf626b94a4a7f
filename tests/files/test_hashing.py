"""Test that hashes of many files are right, and that cached hashes are used for unchanged files only."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from cogflow.files import hashing
from cogflow.files.hashing import cache_file, hash_file, hash_files, hash_with_cache

LONG_AGO = 10**18


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "SMALLEST_CACHED", 4)
    path = tmp_path / "weights"
    path.write_bytes(b"first")
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_cached_file_is_not_read_again(file: Path) -> None:
    assert hash_with_cache([file]) == ({file: sha256(b"first")}, 0)
    advanced: list[int] = []
    file.write_bytes(b"other")  # same length, and its time is set back: only reading it shows the change
    os.utime(file, ns=(LONG_AGO, LONG_AGO))
    assert hash_with_cache([file], lambda count, name: advanced.append(count)) == ({file: sha256(b"first")}, 5)
    assert advanced == [5]
    assert hash_with_cache([file], rehash=True) == ({file: sha256(b"other")}, 0)
    assert hash_with_cache([file]) == ({file: sha256(b"other")}, 5)


@pytest.mark.parametrize("how", ["time", "size", "inode"])
def test_a_changed_file_is_read_again(file: Path, how: str) -> None:
    hash_with_cache([file])
    if how == "inode":
        file.rename(file.with_name("old"))
    file.write_bytes(b"longer" if how == "size" else b"other")
    os.utime(file, ns=(LONG_AGO, LONG_AGO + (how == "time")))
    assert hash_with_cache([file]) == ({file: sha256(file.read_bytes())}, 0)


def test_a_file_that_was_just_written_is_not_cached(file: Path) -> None:
    os.utime(file)
    hash_with_cache([file])
    assert hash_with_cache([file])[1] == 0


def test_a_hard_link_is_the_same_file(file: Path, tmp_path: Path) -> None:
    hash_with_cache([file])
    os.link(file, tmp_path / "linked")
    assert hash_with_cache([tmp_path / "linked"]) == ({tmp_path / "linked": sha256(b"first")}, 5)


def test_a_cache_that_cannot_be_read_or_written_only_costs_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hash_with_cache([file])
    cache_file().write_text("{")
    assert hash_with_cache([file]) == ({file: sha256(b"first")}, 0)
    (file.parent / "no-folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file.parent / "no-folder"))
    assert hash_with_cache([file]) == ({file: sha256(b"first")}, 0)


def test_the_hash_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000  # more than two pieces
    (tmp_path / "a").write_bytes(data)
    assert hash_file(tmp_path / "a") == sha256(data)


def test_many_files_are_hashed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "PIECE", 1000)
    paths = [tmp_path / str(number) for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(number * 997))
    advanced: dict[str, int] = {}
    found = hash_files(paths, lambda count, name: advanced.update({name: advanced.get(name, 0) + count}))
    assert found == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert advanced == {path.name: path.stat().st_size for path in paths if path.stat().st_size}


def test_a_file_that_cannot_be_read_stops_the_others(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"source")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        hash_files([tmp_path / "source", tmp_path / "folder"])


def test_a_cache_file_without_a_version_is_used(file: Path) -> None:
    hash_with_cache([file])
    hashes = json.loads(cache_file().read_text())["hashes"]
    cache_file().write_text(json.dumps(hashes))
    assert hash_with_cache([file])[1] == 5
