"""Test that each package imports only packages of lower tiers. Imports are read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TIERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("rank_identity",),
    ("files", "sharpness"),
    ("records",),
    ("config", "runtime"),
    ("models", "tracking", "weights"),
    ("artifacts",),
    ("data", "export"),
    ("sampling",),
    ("ladder",),
    ("assemble", "training"),
    ("diagnosis", "planning"),
    ("benchmarking",),
    ("stages",),
    ("cli",),
    ("__main__",),
)
"""Packages of cogflow, lowest tier first. A package imports itself and packages of lower tiers, nothing else."""

STANDALONE = {"sharpness"}
"""Packages that import nothing of cogflow: they are usable by whoever has videos."""

LEVEL = {name: level for level, tier in enumerate(TIERS) for name in tier}


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def package_of(dotted: str) -> str | None:
    """Return the package or top module of cogflow that contains ``dotted``.

    ``None``: for names outside cogflow and for ``cogflow`` itself.
    """
    words = dotted.split(".")
    return words[1] if words[0] == "cogflow" and len(words) > 1 and not words[1].startswith("__version") else None


def violations(package: Path) -> list[str]:
    """Return a line for each import in ``package``, a folder named cogflow, that the tiers forbid."""
    found = []
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        owner = where.parts[0].removesuffix(".py")
        if owner == "__init__":
            found += [f"{where} imports {name}" for name in imported(path) if package_of(name)]
        elif owner not in LEVEL:
            found.append(f"{where}: {owner} is in no tier")
        else:
            found += [f"{where} imports {name}" for name in imported(path) if not may_import(where, owner, name)]
    return found


def may_import(where: Path, owner: str, name: str) -> bool:
    """Return whether the file ``where`` of the package ``owner`` may import the dotted ``name``."""
    if name.split(".")[0] == "deepspeed":
        return where.as_posix() == "training/deepspeed_start.py"
    target = package_of(name)
    if target is None:
        return True
    if target == owner:
        return owner != "stages" or where.name in ("flow.py", "__init__.py")
    return owner not in STANDALONE and LEVEL.get(target, len(TIERS)) < LEVEL[owner]


def test_each_package_imports_only_lower_tiers(repository: Path) -> None:
    assert violations(repository / "cogflow") == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("files/a.py", "from cogflow.config.run_section import RunConfig"),
        ("models/a.py", "def f():\n    import cogflow.training.loop"),
        ("config/a.py", "from cogflow import models"),
        ("data/a.py", "from cogflow.stages.train import run"),
        ("data/a.py", "import deepspeed.comm"),
        ("data/a.py", "from cogflow.export.facts import Facts"),
        ("sharpness/a.py", "from cogflow.config.data_section import DataConfig"),
        ("stages/train.py", "from cogflow.stages import prepare"),
        ("__init__.py", "from cogflow.models import family"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, path: str, line: str) -> None:
    file = tmp_path / "cogflow" / path
    file.parent.mkdir(parents=True)
    file.write_text(line, encoding="utf-8")
    assert [complaint.split(" ")[0] for complaint in violations(tmp_path / "cogflow")] == [path]


def test_a_package_without_a_tier_is_found(tmp_path: Path) -> None:
    (tmp_path / "cogflow").mkdir()
    (tmp_path / "cogflow" / "loose.py").write_text("", encoding="utf-8")
    assert violations(tmp_path / "cogflow") == ["loose.py: loose is in no tier"]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("training/deepspeed_start.py", "import deepspeed"),
        ("stages/flow.py", "from cogflow.stages import train"),
        ("training/a.py", "from cogflow.files.publish import publish_folder"),
    ],
)
def test_an_import_of_a_lower_tier_passes(tmp_path: Path, path: str, line: str) -> None:
    file = tmp_path / "cogflow" / path
    file.parent.mkdir(parents=True)
    file.write_text(line, encoding="utf-8")
    assert violations(tmp_path / "cogflow") == []


@pytest.mark.parametrize("heavy", ["torch", "diffusers", "transformers", "deepspeed", "wandb"])
def test_the_command_line_imports_no_heavy_package(repository: Path, heavy: str) -> None:
    names = ["cogflow", "cogflow.__main__", "cogflow.cli", "cogflow.errors", "cogflow.stages"]
    for package in ("config", "files"):
        names += [
            f"cogflow.{package}.{path.stem}"
            for path in (repository / "cogflow" / package).glob("*.py")
            if path.stem != "__init__"
        ]
    imports = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)"
    code = f"{imports}\nsys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, check=False).returncode == 0
