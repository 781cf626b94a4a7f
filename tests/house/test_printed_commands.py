"""Test that no module writes a command by hand: cogflow.config.command quotes commands and names their run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

ALLOWED = ("config/command.py", "config/help_text.py")
"""Modules with hand-written commands: the one that builds them, and the help text."""
HELP = "stage=NAME --help"
"""Text of a command that only shows help."""


def hand_written(text: str) -> list[str]:
    """Return ``line: text`` of each hand-written command outside of docstrings."""
    tree = ast.parse(text)
    return [f"{line}: {found}" for line, found in _commands(tree)]


def _commands(tree: ast.Module) -> Iterator[tuple[int, str]]:
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))  # a docstring
        elif isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            whole = "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
            if _is_command(whole):
                yield node.lineno, whole
        elif isinstance(node, ast.List | ast.Tuple):
            first = ast.unparse(node.elts[0]) if node.elts else ""
            values = [one.value for one in node.elts if isinstance(one, ast.Constant)]
            # A process that is started is no text for a user.
            if first != "sys.executable" and ("-m", "cogflow") in zip(values, values[1:], strict=False):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and id(node) not in skipped and _is_command(node.value):
            yield node.lineno, node.value


def _is_command(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and "-m cogflow" in value and HELP not in value and "-m cogflow." not in value


def test_no_command_is_written_by_hand(repository: Path) -> None:
    package = repository / "cogflow"
    found = {
        path.relative_to(package).as_posix(): hand_written(path.read_text("utf-8")) for path in package.rglob("*.py")
    }
    assert {name: lines for name, lines in found.items() if lines and name not in ALLOWED} == {}


@pytest.mark.parametrize(
    "text",
    [
        'hint = "Train first: python -m cogflow stage=train"',
        'hint = f"Export it: python -m cogflow stage=export stage.source={path}"',
        'words = ["python", "-m", "cogflow", stage]',
    ],
)
def test_a_hand_written_command_is_found(text: str) -> None:
    assert len(hand_written(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        '"""Run ``python -m cogflow stage=train``."""',
        'words = [sys.executable, "-m", "cogflow", "stage=train"]',
        'HELP = "python -m cogflow stage=NAME --help lists every key."',
    ],
)
def test_help_and_processes_are_no_printed_commands(text: str) -> None:
    assert hand_written(text) == []
