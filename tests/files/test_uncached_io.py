"""Test that files written and read past the page cache hold what was written, and that read-back finds changes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
from pathlib import Path

import pytest

from cogflow.errors import StorageError
from cogflow.files import uncached_io
from cogflow.files.hashing import hash_file
from cogflow.files.uncached_io import ReadBack, UncachedWriter, hash_uncached, read_uncached


@pytest.fixture(autouse=True)
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncached_io, "SPAN", 10_000)


@pytest.mark.parametrize("size", [0, 1, 9_999, 10_000, 123_457, uncached_io.PIECE, uncached_io.PIECE + 3])
def test_written_bytes_are_read_back(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    with contextlib.closing(UncachedWriter(tmp_path / "file")) as file:
        for start in range(0, size, 7_001):
            assert file.write(memoryview(data)[start : start + 7_001]) == len(data[start : start + 7_001])
    assert (tmp_path / "file").read_bytes() == data
    assert b"".join(bytes(piece) for piece in read_uncached(tmp_path / "file")) == data
    assert hash_uncached(tmp_path / "file") == hash_file(tmp_path / "file")


def test_spans_are_written_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(60_000))
    with contextlib.closing(UncachedWriter(tmp_path / "file", "r+b")) as file:
        for place, value in ((30_000, b"b"), (100, b"a"), (100 + 12_000, b"c")):
            file.seek(place)
            file.write(value * 12_000)
    data = (tmp_path / "file").read_bytes()
    assert data == bytes(100) + b"a" * 12_000 + b"c" * 12_000 + bytes(5_900) + b"b" * 12_000 + bytes(18_000)


def test_a_file_system_without_direct_reading_is_read_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    opened = os.open

    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    assert b"".join(bytes(piece) for piece in read_uncached(tmp_path / "file")) == b"content"


def test_direct_reading_falls_back_at_an_odd_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback continues where direct reading ended; it reads nothing twice."""
    data = random.Random(0).randbytes(100_000)
    (tmp_path / "file").write_bytes(data)
    descriptors = []
    opened, read = os.open, os.preadv

    def remember(path: Path, flags: int) -> int:
        descriptor = opened(path, flags & ~os.O_DIRECT)
        if flags & os.O_DIRECT:
            descriptors.append(descriptor)
        return descriptor

    def short(descriptor: int, buffers: list[memoryview], at: int) -> int:
        if descriptor in descriptors and at % 512:
            descriptors.clear()
            raise OSError(errno.EINVAL, "Invalid argument")
        return read(descriptor, [buffers[0][:30_720] if at < 60_000 else buffers[0][:1_001]], at)

    monkeypatch.setattr(os, "open", remember)
    monkeypatch.setattr(os, "preadv", short)
    assert b"".join(bytes(piece) for piece in read_uncached(tmp_path / "file")) == data
    assert descriptors == []


def test_other_errors_are_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(read_uncached(tmp_path / "none"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_disk_raises_at_the_write_and_the_file_can_be_closed() -> None:
    file = UncachedWriter(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left") as caught:
        file.write(b"x" * 20_000)
    assert caught.value.errno == errno.ENOSPC
    file.close()


def files(folder: Path, count: int) -> dict[Path, str]:
    found = {}
    for number in range(count):
        path = folder / f"shard-{number}"
        path.write_bytes(bytes([number]) * 100_000)
        found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def test_files_that_are_as_written_pass(tmp_path: Path) -> None:
    advanced: list[tuple[int, str]] = []
    with ReadBack() as reading:
        for path, sha256 in files(tmp_path, 3).items():
            reading.add(path, sha256)
        reading.finish(lambda size, name: advanced.append((size, name)))
        assert reading.pending_bytes() == 0
    assert set(advanced) <= {(100_000, f"shard-{number}") for number in range(3)}


def test_every_changed_file_is_named(tmp_path: Path) -> None:
    hashes = files(tmp_path, 4)
    for number in (1, 3):
        with (tmp_path / f"shard-{number}").open("r+b") as file:
            file.seek(50_000)
            file.write(b"!")
    with ReadBack() as reading:
        for path, sha256 in hashes.items():
            reading.add(path, sha256)
        with pytest.raises(StorageError, match="^shard-1, shard-3 came back"):
            reading.finish(lambda size, name: None)


def test_a_missing_file_raises_file_not_found(tmp_path: Path) -> None:
    with ReadBack() as reading:
        reading.add(tmp_path / "none", "")
        with pytest.raises(FileNotFoundError):
            reading.finish(lambda size, name: None)
