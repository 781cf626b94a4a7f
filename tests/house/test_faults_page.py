"""Test that docs/faults.md names tests that exist and lists every file of fault tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def named(repository: Path) -> set[tuple[str, str]]:
    text = (repository / "docs/faults.md").read_text(encoding="utf-8")
    return {(file, test) for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)}


def test_every_test_that_the_page_names_exists(repository: Path) -> None:
    pairs = named(repository)
    assert len(pairs) > 30
    assert [f"{file}::{test}" for file, test in sorted(pairs) if test not in names_in(repository / file)] == []


def test_every_row_has_a_test(repository: Path) -> None:
    rows = [
        line
        for line in (repository / "docs/faults.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    assert [row for row in rows if "::test_" not in row and not row.startswith(("| fault |", "| --- |"))] == []


def test_files_of_fault_tests_are_on_the_page(repository: Path) -> None:
    files = {path.relative_to(repository).as_posix() for path in (repository / "tests/faults").glob("test_*.py")}
    assert files == {file for file, _ in named(repository) if file.startswith("tests/faults/")}
