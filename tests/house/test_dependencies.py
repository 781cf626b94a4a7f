"""Test that the declared dependencies are exactly the third-party modules that the package imports."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DISTRIBUTIONS = {
    "PIL": "pillow",
    "pywt": "pywavelets",
    "yaml": "pyyaml",
    "hydra": "hydra-core",
    "pydantic_core": "pydantic",
}
"""Imported module -> its distribution, where the names differ. pydantic pins its pydantic-core exactly."""

NOT_IMPORTED = {"protobuf", "sentencepiece"}
"""Declared distributions that transformers imports to load T5's tokenizer."""


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the top-level names of all modules that a file imports, inside functions, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def third_party(folder: Path) -> set[str]:
    """Return the distributions of the third-party modules that the Python files below ``folder`` import."""
    modules = {name for path in folder.rglob("*.py") for name in imported_modules(path)}
    modules -= {"cogflow", *sys.stdlib_module_names}
    return {normalised(DISTRIBUTIONS.get(name, name)) for name in modules}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(repository: Path) -> set[str]:
    """Return the distributions of ``dependencies`` in pyproject.toml."""
    text = (repository / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert listed
    return {
        normalised(name) for name in re.findall(r'^    "([A-Za-z0-9._-]+?)(?=[<>=!~ "\[;])', listed[1], re.MULTILINE)
    }


def test_every_import_is_declared(repository: Path) -> None:
    assert third_party(repository / "cogflow") - declared(repository) == set()


def test_every_dependency_is_imported(repository: Path) -> None:
    assert declared(repository) - third_party(repository / "cogflow") == NOT_IMPORTED


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import yaml", {"pyyaml"}),
        ("def f():\n    from huggingface_hub.utils import x", {"huggingface-hub"}),
        ("import os.path\nfrom cogflow.files import paths", set()),
    ],
)
def test_imports_are_found(tmp_path: Path, line: str, found: set[str]) -> None:
    (tmp_path / "module.py").write_text(line, encoding="utf-8")
    assert third_party(tmp_path) == found
