"""Files read again after they were written: equal ones pass, a changed or missing one is named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from cogflow.errors import StorageError
from cogflow.files.readback import ReadBack


def files(folder: Path, count: int) -> dict[Path, str]:
    found = {}
    for number in range(count):
        path = folder / f"shard-{number}"
        path.write_bytes(bytes([number]) * 100_000)
        found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def test_what_is_as_it_was_written_passes(tmp_path: Path) -> None:
    told: list[tuple[int, str]] = []
    with ReadBack() as reading:
        for path, sha256 in files(tmp_path, 3).items():
            reading.add(path, sha256)
        reading.finish(lambda size, name: told.append((size, name)))
        assert reading.waiting() == 0
    assert set(told) <= {(100_000, f"shard-{number}") for number in range(3)}


def test_every_changed_file_is_named(tmp_path: Path) -> None:
    hashes = files(tmp_path, 4)
    for number in (1, 3):
        with open(tmp_path / f"shard-{number}", "r+b") as file:
            file.seek(50_000)
            file.write(b"!")
    with ReadBack() as reading:
        for path, sha256 in hashes.items():
            reading.add(path, sha256)
        with pytest.raises(StorageError, match="^shard-1, shard-3 came back"):
            reading.finish(lambda size, name: None)


def test_a_file_that_is_gone_is_the_callers_matter(tmp_path: Path) -> None:
    with ReadBack() as reading:
        reading.add(tmp_path / "none", "")
        with pytest.raises(FileNotFoundError):
            reading.finish(lambda size, name: None)
