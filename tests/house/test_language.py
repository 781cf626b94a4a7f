"""Test the project's vocabulary: docstrings are sentences, and identifiers use the terms of docs/glossary.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

FRAGMENTS = ("Of ", "Have ", "What ", "Whether ", "How ", "Where ", "Who ", "Why ")
"""First words of docstrings that are fragments instead of sentences."""

RETIRED = re.compile(
    r"(?:^|_)(acquit\w*|ceiling\w*|dealt|guilty|guilt|mend|mended|mending|owed|panel|panels|redeal\w*|told|wishes)(?:_|$)"
)
"""Words that have a standard term in docs/glossary.md."""


def python_files(repository: Path) -> list[Path]:
    """Return every Python file of the project."""
    folders = ("cogflow", "benchmarks", "tools", "examples", "tests")
    return [path for folder in folders for path in sorted((repository / folder).rglob("*.py"))]


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of each definition, parameter, variable and attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def fragments(text: str) -> list[str]:
    """Return ``line: docstring`` of each docstring that begins like a fragment."""
    found = docstrings(ast.parse(text))
    return [f"{line}: {docstring.splitlines()[0]}" for line, docstring in found if docstring.startswith(FRAGMENTS)]


def retired_names(text: str) -> list[str]:
    """Return ``line: name`` of each identifier that uses a retired word."""
    return [f"{line}: {name}" for line, name in identifiers(ast.parse(text)) if RETIRED.search(name.lower())]


@pytest.mark.parametrize("check", [fragments, retired_names])
def test_text_and_names_are_plain(repository: Path, check: object) -> None:
    assert callable(check)
    found = {
        path.relative_to(repository).as_posix(): check(path.read_text("utf-8")) for path in python_files(repository)
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_a_fragment_is_found() -> None:
    assert fragments('def f():\n    """Of ranks, the first."""') == ["1: Of ranks, the first."]
    assert fragments('def f():\n    """Return the first rank."""') == []


def test_a_retired_name_is_found() -> None:
    assert retired_names("def told_lines(owed): pass") == ["1: told_lines", "1: owed"]
    assert retired_names("threshold = panels_of = 1") == ["1: panels_of"]
