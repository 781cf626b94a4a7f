"""Large files written and read past the page cache hold what was written."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from pathlib import Path

import pytest

from cogflow.files import uncached_io
from cogflow.files.manifest import hash_file, hash_uncached
from cogflow.files.uncached_io import UncachedWriter, read_uncached


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncached_io, "STRETCH", 10_000)


@pytest.mark.parametrize("size", [0, 1, 9_999, 10_000, 123_457, uncached_io.PIECE, uncached_io.PIECE + 3])
def test_what_is_written_is_read(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    with contextlib.closing(UncachedWriter(tmp_path / "file")) as file:
        for start in range(0, size, 7_001):
            assert file.write(memoryview(data)[start : start + 7_001]) == len(data[start : start + 7_001])
    assert (tmp_path / "file").read_bytes() == data
    assert b"".join(bytes(piece) for piece in read_uncached(tmp_path / "file")) == data
    assert hash_uncached(tmp_path / "file") == hash_file(tmp_path / "file")


def test_places_are_filled_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(60_000))
    with contextlib.closing(UncachedWriter(tmp_path / "file", "r+b")) as file:
        for place, value in ((30_000, b"b"), (100, b"a"), (100 + 12_000, b"c")):
            file.seek(place)
            file.write(value * 12_000)
    data = (tmp_path / "file").read_bytes()
    assert data == bytes(100) + b"a" * 12_000 + b"c" * 12_000 + bytes(5_900) + b"b" * 12_000 + bytes(18_000)


def test_a_file_system_that_does_not_open_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"content")
    opened = os.open

    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    assert b"".join(bytes(piece) for piece in read_uncached(tmp_path / "file")) == b"content"


def test_a_file_system_that_reads_directly_from_even_places_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in short pieces: what was read already is not read again."""
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


def test_other_faults_are_the_callers(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(read_uncached(tmp_path / "none"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_disk_is_told_by_the_write_and_the_file_is_closed() -> None:
    file = UncachedWriter(Path("/dev/full"))
    with pytest.raises(OSError) as caught:
        file.write(b"x" * 20_000)
    assert caught.value.errno == errno.ENOSPC
    file.close()
