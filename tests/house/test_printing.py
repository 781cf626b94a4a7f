"""Test that text is printed by ``echo``, ``table`` and ``progress``, which escape it. Calls are read from the syntax
trees.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cogflow

PACKAGE = Path(cogflow.__file__).parent
ESCAPING = {"one_line", "printable", "paragraph"}
AUDITED = {
    "cli.py": "help, version and composed settings; errors are escaped",
    "runtime/console.py": "echo and table escape what they print",
    "runtime/progress.py": "description and note are escaped when they are set",
    "runtime/heartbeat.py": "names of phases, and states that are escaped",
    "planning/scale.py": "tables of constants, for the documentation",
    "assemble/fresh_process.py": "imports nothing of cogflow; it escapes the name itself",
}
"""Modules with a call that prints text that is not escaped in the call, and why."""


def unescaped(text: str) -> Iterator[int]:
    """Yield the lines of calls that print text without a call of an escaping function inside."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in ("print", "sys.stdout.write", "sys.stderr.write") or name.endswith("console.print"):
            inner = {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
            if not inner & ESCAPING:
                yield node.lineno


def test_printed_text_is_escaped() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix(): list(unescaped(path.read_text(encoding="utf-8")))
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    places = {name: lines for name, lines in found.items() if lines}
    assert places.keys() - AUDITED.keys() == set(), "print with cogflow.runtime.console.echo"
    assert AUDITED.keys() - places.keys() == set(), "nothing is printed there any more"


@pytest.mark.parametrize("text", ["print(name)", "import sys\nsys.stderr.write(name)", "console.print(name)"])
def test_a_new_call_is_found(text: str) -> None:
    assert list(unescaped(text))


def test_an_escaped_text_is_allowed() -> None:
    assert not list(unescaped("print(one_line(name))"))
