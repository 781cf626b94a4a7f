"""Test that every difference between a folder and its manifest is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cogflow.files.publish import check_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"abcdef")
    (tmp_path / "sub" / "b.bin").write_bytes(b"123")
    write_manifest(tmp_path)
    return tmp_path


def test_a_whole_folder_has_no_problems(folder: Path) -> None:
    assert check_manifest(folder) == []
    write_manifest(folder)
    assert check_manifest(folder) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: (f / "a.bin").write_bytes(b"abcdeg"), "a.bin: content changed"),
        (lambda f: (f / "a.bin").write_bytes(b"abc"), "a.bin: 3 bytes, 6 expected"),
        (lambda f: (f / "sub" / "b.bin").unlink(), "sub/b.bin: missing"),
        (lambda f: (f / "sub" / "c.bin").write_bytes(b""), "sub/c.bin: not in the manifest"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: unreadable"),
        (lambda f: (f / "manifest.json").write_text('{"files": [1]}'), "manifest.json: unreadable"),
        (lambda f: (f / "link").symlink_to(f / "sub"), "link: not in the manifest"),
    ],
)
def test_each_difference_is_named(folder: Path, change: Callable[[Path], object], problem: str) -> None:
    change(folder)
    (found,) = check_manifest(folder)
    assert found.startswith(problem)


def test_swapped_files_are_found(folder: Path) -> None:
    (folder / "c.bin").write_bytes(b"fedcba")
    write_manifest(folder)
    (folder / "a.bin").rename(folder / "x")
    (folder / "c.bin").rename(folder / "a.bin")
    (folder / "x").rename(folder / "c.bin")
    assert [problem.split(":")[0] for problem in check_manifest(folder)] == ["a.bin", "c.bin"]


def test_a_link_does_not_replace_a_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "a.bin"
    (folder / "a.bin").rename(elsewhere)
    (folder / "a.bin").symlink_to(elsewhere)
    assert check_manifest(folder) == ["a.bin: a symbolic link in the place of a file"]
