"""Test that every name that tests, benchmarks and tools give as a text exists.

Such a name is a fault point, an attribute to patch, the module of a program, or a name in a script for another process.
Type checks do not see them, and the tests that use them are slow.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import test_histories, test_saves, test_soak
from tests.faults.injected import ACTIONS, POINTS

FOLDERS = ("benchmarks", "examples", "tests", "tools")
OWN = ("cogflow", *FOLDERS)
"""Packages whose names are looked up."""
FAULT = re.compile(r"(?P<action>\w+)@(?P<point>[a-z-]+)(?:#\d+)?(?:/\d+)?")
"""A fault, as :mod:`tests.faults.injected` describes it."""
POINT = re.compile(r"(?P<point>[a-z-]+)#\d+(?:/\d+)?")
"""A fault without its action."""
NAMES_IN_COPIES = ("tests/config/test_contributing.py", "tests/house/test_layering.py", "tests/house/test_names.py")
"""Files that also give names of modules that they write themselves, or that must not exist."""
DOTTED = re.compile(rf"(?:{'|'.join(OWN)})(?:\.[A-Za-z_]\w*)+")
FILE_ENDINGS = (".log", ".toml", ".yaml")


class MissingName(Exception):
    """A name does not exist."""


def resolve(path: str) -> Any:
    """Return the module or attribute of a dotted path. Raises :class:`MissingName`."""
    first, *rest = path.split(".")
    found, module = importlib.import_module(first), first
    for name in rest:
        module = f"{module}.{name}"
        if not hasattr(found, name):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                raise MissingName(f"{path}: {error}") from error
        found = getattr(found, name)
    return found


def imports(tree: ast.AST) -> dict[str, str]:
    """Return the dotted path of each name that ``tree`` imports from the packages of this repository."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                found[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    return {name: path for name, path in found.items() if path.split(".")[0] in OWN}


def dotted_path(node: ast.AST, imported: dict[str, str]) -> str | None:
    """Return the dotted path that an expression such as ``module.Class.method`` names; ``None`` for others."""
    if isinstance(node, ast.Name):
        return imported.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := dotted_path(node.value, imported)):
        return f"{owner}.{node.attr}"
    return None


def patched(tree: ast.AST, imported: dict[str, str]) -> Iterator[str]:
    """Yield the dotted paths that ``setattr(owner, "name", ...)`` and pytest's ``monkeypatch.setattr`` replace."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or len(node.args) < 2:
            continue
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner, name = dotted_path(node.args[0], imported), node.args[1]
        if function == "setattr" and owner and isinstance(name, ast.Constant) and isinstance(name.value, str):
            yield f"{owner}.{name.value}"


def texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def names_in_script(text: str) -> Iterator[str]:
    """Yield the dotted paths of this repository's packages that a text uses when it is a Python program."""
    if not re.search(rf"^\s*(?:import|from) (?:{'|'.join(OWN)})\b", text, re.M):
        return
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    imported = imports(tree)
    yield from imported.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (path := dotted_path(node, imported)):
            yield path


def names_in(tree: ast.AST) -> set[str]:
    """Return the dotted paths that a file gives as texts."""
    found = set(patched(tree, imports(tree)))
    for text in texts(tree):
        is_name = DOTTED.fullmatch(text) and not text.endswith(FILE_ENDINGS)
        found |= {text} if is_name else set(names_in_script(text))
    return found


def missing(paths: set[str]) -> list[str]:
    found = []
    for path in sorted(paths):
        try:
            resolve(path)
        except MissingName as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("point", POINTS)
def test_every_fault_point_exists(point: str) -> None:
    module, name, when = POINTS[point]
    assert callable(resolve(f"{module}.{name}"))
    assert when in ("before", "after", "result")


def test_every_fault_of_a_test_has_a_point_and_an_action(repository: Path) -> None:
    words = {
        word
        for path in sorted((repository / "tests").rglob("*.py"))
        for text in texts(ast.parse(path.read_text(encoding="utf-8")))
        for word in text.split(",")
    }
    faults = list(filter(None, map(FAULT.fullmatch, words)))
    points = list(filter(None, map(POINT.fullmatch, words)))
    assert len(faults) > 20 and len(points) > 5
    assert [fault[0] for fault in faults if fault["action"] not in ACTIONS] == []
    assert [fault[0] for fault in [*faults, *points] if fault["point"] not in POINTS] == []
    assert {*test_histories.KILLED_AT, *test_saves.PHASES, *test_soak.KILLED_AT} <= POINTS.keys()


def test_every_name_given_as_a_text_exists(repository: Path) -> None:
    by_file = {
        path.relative_to(repository).as_posix(): names_in(ast.parse(path.read_text(encoding="utf-8")))
        for folder in FOLDERS
        for path in sorted((repository / folder).rglob("*.py"))
        if path.relative_to(repository).as_posix() not in NAMES_IN_COPIES
    }
    assert sum(map(len, by_file.values())) > 80
    assert {file: found for file, paths in by_file.items() if (found := missing(paths))} == {}


@pytest.mark.parametrize(
    "line",
    [
        'monkeypatch.setattr(publish, "renamed_function", None)',
        'setattr(publish, "renamed_function", None)',
        'server.run(program="cogflow.renamed_module")',
        'code = "from cogflow.files import renamed_module"',
        'code = "from cogflow.files import publish\\npublish.renamed_function = None"',
    ],
)
def test_a_name_that_does_not_exist_is_found(line: str) -> None:
    (found,) = missing(names_in(ast.parse(f"from cogflow.files import publish\n{line}")))
    assert "renamed_" in found
