"""A file that is remembered is not read; one that changed in any way is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from cogflow.files import hash_cache
from cogflow.files.hash_cache import hash_known

LONG_AGO = 10**18


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_cache, "SMALLEST", 4)
    path = tmp_path / "weights"
    path.write_bytes(b"first")
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_what_is_known_is_not_read_again(file: Path) -> None:
    assert hash_known([file]) == ({file: sha256(b"first")}, 0)
    told: list[int] = []
    file.write_bytes(b"other")  # as long, and its time is set back: nothing but reading it could tell
    os.utime(file, ns=(LONG_AGO, LONG_AGO))
    assert hash_known([file], lambda count, name: told.append(count)) == ({file: sha256(b"first")}, 5) and told == [5]
    assert hash_known([file], rehash=True) == ({file: sha256(b"other")}, 0)
    assert hash_known([file]) == ({file: sha256(b"other")}, 5)


@pytest.mark.parametrize("how", ["time", "size", "inode"])
def test_what_changed_is(file: Path, how: str) -> None:
    hash_known([file])
    if how == "inode":
        file.rename(file.with_name("old"))
    file.write_bytes(b"longer" if how == "size" else b"other")
    os.utime(file, ns=(LONG_AGO, LONG_AGO + (how == "time")))
    assert hash_known([file]) == ({file: sha256(file.read_bytes())}, 0)


def test_a_file_that_was_just_written_is_not_remembered(file: Path) -> None:
    os.utime(file)
    hash_known([file])
    assert hash_known([file])[1] == 0


def test_a_link_is_the_same_file(file: Path, tmp_path: Path) -> None:
    hash_known([file])
    os.link(file, tmp_path / "linked")
    assert hash_known([tmp_path / "linked"]) == ({tmp_path / "linked": sha256(b"first")}, 5)


def test_a_memory_that_is_broken_or_cannot_be_written_costs_only_time(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_known([file])
    hash_cache.cache_file().write_text("{")
    assert hash_known([file]) == ({file: sha256(b"first")}, 0)
    (file.parent / "no-folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file.parent / "no-folder"))
    assert hash_known([file]) == ({file: sha256(b"first")}, 0)
