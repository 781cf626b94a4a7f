"""Test that a placed file has the bytes of its source and that the way it was placed is reported."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from cogflow.errors import StorageError
from cogflow.files import linking
from cogflow.files.linking import can_link, place_file

DATA = os.urandom(9_000_001)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("mode", ["auto", "hard"])
def test_small_files_and_files_of_the_package_are_copied(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    small = tmp_path / "small.safetensors"
    small.write_bytes(b"small")
    assert place_file(small, tmp_path / "one", mode, hashlib.sha256(b"small").hexdigest()) == "copy"
    monkeypatch.setattr(linking, "PACKAGE", tmp_path.resolve())
    assert place_file(source, tmp_path / "two", mode, SHA256) == "copy"
    assert source.stat().st_nlink == small.stat().st_nlink == 1 and linking.is_copied(source, mode)


def test_a_hard_linked_file_is_read_only(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linking, "_reflink", lambda source, target: False)
    assert place_file(source, tmp_path / "target", "auto", SHA256) == "hard"
    assert source.stat().st_mode & 0o222 == 0


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(linking, "_reflink", lambda source, target: False)


def test_a_link_shares_its_bytes(source: Path, tmp_path: Path) -> None:
    how = place_file(source, tmp_path / "target", "auto", SHA256)
    assert how in ("reflink", "hard") and (tmp_path / "target").read_bytes() == DATA
    assert source.samefile(tmp_path / "target") == (how == "hard")
    assert can_link(source, tmp_path) and sorted(path.name for path in tmp_path.iterdir()) == [
        "source.safetensors",
        "target",
    ]


def test_a_reflink_is_preferred_to_a_hard_link(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    asked = []

    def clone(target: int, request: int, origin: int) -> int:
        asked.append(request)
        os.sendfile(target, origin, 0, len(DATA))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    assert place_file(source, tmp_path / "target", "auto", SHA256) == "reflink" and asked == [0x40049409]
    assert (tmp_path / "target").read_bytes() == DATA and source.stat().st_nlink == 1


def test_a_copy_is_a_separate_file(source: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    assert place_file(source, tmp_path / "target", "copy", SHA256, lambda count, name: seen.append(count)) == "copy"
    assert source.stat().st_nlink == 1 and (tmp_path / "target").read_bytes() == DATA and sum(seen) == len(DATA)


def test_without_links_auto_copies_and_hard_raises(source: Path, tmp_path: Path, no_links: None) -> None:
    assert place_file(source, tmp_path / "one", "auto", SHA256) == "copy"
    with pytest.raises(StorageError, match=r"(?s)cannot be hard-linked .*stage\.link=copy") as caught:
        place_file(source, tmp_path / "two", "hard", SHA256)
    assert caught.value.exit_code == 2 and not (tmp_path / "two").exists() and not can_link(source, tmp_path)


def test_a_source_that_changes_during_the_copy_is_refused(source: Path, tmp_path: Path) -> None:
    source.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))
    with pytest.raises(StorageError, match="changed while it was copied"):
        place_file(source, tmp_path / "target", "copy", SHA256)
