from __future__ import annotations

from pathlib import Path

import pytest

from cogflow.config.run_section import RunConfig
from cogflow.errors import DataError
from cogflow.files.paths import contained, run_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (root / "inside").symlink_to(root / "sub")
    (root / "out").symlink_to(tmp_path)
    (root / "file").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to(root / "loop")
    return root


@pytest.mark.parametrize("name", ["a.mp4", "sub/a.mp4", "inside/a.mp4", "..a.mp4", "a..b/c", "./a.mp4"])
def test_names_inside_the_root_are_accepted(root: Path, name: str) -> None:
    assert contained(root, name) == root / name


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "sub/../../secret",
        "/etc/passwd",
        "out/secret",
        "file",
        "loop/x",
        "",
        " ",
        "a\0b",
        "..",
        "..\\secret",
        "C:\\x",
        "\\\\host\\x",
    ],
)
def test_names_that_lead_out_are_refused(root: Path, name: str) -> None:
    with pytest.raises(DataError):
        contained(root, name)


def test_a_linked_root_is_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    assert contained(tmp_path / "alias", "sub/a") == tmp_path / "alias" / "sub" / "a"


def test_a_run_folder_is_root_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert run_folder(RunConfig()) == Path("runs/tiny-shapes")
    assert run_folder(RunConfig(root="~/runs", name="a")) == Path("/home/someone/runs/a")
