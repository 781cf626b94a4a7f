"""Test that step names are written and parsed alike."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cogflow.artifacts.run_layout import parse_step, run_of_checkpoint, step_folders, step_name, step_of


@pytest.mark.parametrize(
    ("step", "name"), [(0, "step-000000"), (100, "step-000100"), (999_999, "step-999999"), (1_000_000, "step-1000000")]
)
def test_a_step_name_is_parsed_to_its_step(step: int, name: str) -> None:
    assert step_name(step) == name
    assert parse_step(name) == step


@pytest.mark.parametrize("name", ["step-100", "finetune-step-000500", "step-000100-ema", ".step-000100.partial-7", ""])
def test_other_names_are_not_steps(name: str) -> None:
    assert parse_step(name) is None
    with pytest.raises(ValueError, match="not the name"):
        step_of(Path(name))


def test_step_folders_are_sorted_by_step(tmp_path: Path) -> None:
    for name in ("step-1000000", "step-000020", "step-000003", "step-3", "latest.json", ".step-000050.partial-1"):
        (tmp_path / name).mkdir()
    assert [path.name for path in step_folders(tmp_path)] == ["step-000003", "step-000020", "step-1000000"]
    assert step_folders(tmp_path / "missing") == []


def test_a_checkpoint_in_checkpoints_belongs_to_its_run(tmp_path: Path) -> None:
    assert run_of_checkpoint(tmp_path / "run" / "checkpoints" / "step-000004") == tmp_path / "run"
    assert run_of_checkpoint(tmp_path / "copies" / "step-000004") is None
    assert run_of_checkpoint(Path()) is None


def test_no_other_module_formats_or_parses_step_names(repository: Path) -> None:
    pattern = re.compile(r"""step-[\\({]|glob\(f?["']step-|name\[5:\]""")
    found = [
        f"{path.relative_to(repository)}: {line.strip()}"
        for path in sorted((repository / "cogflow").rglob("*.py"))
        if path.name != "run_layout.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    ]
    assert found == []
