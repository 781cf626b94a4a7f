"""Imports point one way, read from the syntax trees: nothing is imported to find out."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

MIDDLE = {
    "training", "sampling", "sharpness", "rungs", "pipeline", "conversion", "weights", "data", "tracking", "pretraining", "benchmarking",
    "diagnosis", "planning",
}  # fmt: skip
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "config": {"files", "errors"},
    "ranks": {"errors"},
    "models": {"config", "files", "errors", "ranks"},
    "stages": MIDDLE | {"models", "config", "files", "errors", "ranks"},
    "__main__": {"stages", "config", "files", "errors"},
    **{name: MIDDLE | {"models", "config", "files", "errors", "ranks"} for name in MIDDLE},
    "sharpness": set(),  # of use by itself, to whoever has videos
}
"""Package of cogflow to the packages it may import, beside itself and the version in ``cogflow/__init__.py``."""


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def part(dotted: str) -> str | None:
    """The package of cogflow that a dotted name lies in; ``None`` for what is not ours and for cogflow itself."""
    words = dotted.split(".")
    return words[1] if words[0] == "cogflow" and len(words) > 1 and not words[1].startswith("__version") else None


def violations(package: Path) -> list[str]:
    """Every import below ``package`` (a folder named cogflow) that points the wrong way."""
    found = []
    edges: set[tuple[str, str]] = set()
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        owner = where.parts[0].removesuffix(".py")
        if owner == "__init__":
            found += [f"{where} imports {name}" for name in imported(path) if part(name)]
            continue
        if owner not in ALLOWED:
            found.append(f"{where}: {owner} has no place in the layout")
            continue
        for name in imported(path):
            if name.split(".")[0] == "deepspeed" and where.as_posix() != "training/deepspeed_start.py":
                found.append(f"{where} imports deepspeed")
            target = part(name)
            if target is None:
                continue
            if target != owner and target not in ALLOWED[owner]:
                found.append(f"{where} imports {name}")
            if owner == target == "stages" and where.name not in ("flow.py", "__init__.py"):
                found.append(f"{where} imports another stage: {name}")
            if target != owner:
                edges.add((owner, target))
    return found + [f"packages import each other in a circle: {circle}" for circle in circles(edges)]


def circles(edges: set[tuple[str, str]]) -> list[str]:
    """Packages that can reach themselves."""
    reach = {a: {b for x, b in edges if x == a} for a, _ in edges}
    for _ in reach:
        for name, targets in reach.items():
            reach[name] = targets.union(*(reach.get(target, set()) for target in targets))
    around = sorted(name for name, targets in reach.items() if name in targets)
    return [", ".join(around)] if around else []


def test_imports_point_one_way(repository: Path) -> None:
    assert violations(repository / "cogflow") == []


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("files/a.py", "from cogflow.config.schema import RunConfig", "files/a.py imports cogflow.config.schema.RunConfig"),
        ("models/a.py", "def f():\n    import cogflow.training.loop", "models/a.py imports cogflow.training.loop"),
        ("config/a.py", "from cogflow import models", "config/a.py imports cogflow.models"),
        ("data/a.py", "from cogflow.stages.train import run", "data/a.py imports cogflow.stages.train.run"),
        ("data/a.py", "import deepspeed.comm", "data/a.py imports deepspeed"),
        ("sharpness/a.py", "from cogflow.config.schema import DataConfig", "sharpness/a.py imports cogflow.config.schema.DataConfig"),
        ("stages/train.py", "from cogflow.stages import prepare", "stages/train.py imports another stage: cogflow.stages.prepare"),
        ("__init__.py", "from cogflow.models import family", "__init__.py imports cogflow.models.family"),
        ("loose.py", "", "loose.py: loose has no place in the layout"),
    ],
)
def test_the_check_finds(tmp_path: Path, path: str, line: str, complaint: str) -> None:
    file = tmp_path / "cogflow" / path
    file.parent.mkdir(parents=True)
    file.write_text(line, encoding="utf-8")
    assert violations(tmp_path / "cogflow") == [complaint]


def test_the_check_finds_circles(tmp_path: Path) -> None:
    for owner, target in (("data", "tracking"), ("tracking", "sampling"), ("sampling", "data")):
        (tmp_path / "cogflow" / owner).mkdir(parents=True)
        (tmp_path / "cogflow" / owner / "a.py").write_text(f"import cogflow.{target}.a", encoding="utf-8")
    assert violations(tmp_path / "cogflow") == ["packages import each other in a circle: data, sampling, tracking"]


def test_what_is_permitted_passes(tmp_path: Path) -> None:
    for path, line in (("training/deepspeed_start.py", "import deepspeed"), ("stages/flow.py", "from cogflow.stages import train")):
        file = tmp_path / "cogflow" / path
        file.parent.mkdir(parents=True)
        file.write_text(line, encoding="utf-8")
    assert violations(tmp_path / "cogflow") == []


@pytest.mark.parametrize("heavy", ["torch", "diffusers", "transformers", "deepspeed", "wandb"])
def test_the_front_door_is_light(repository: Path, heavy: str) -> None:
    names = ["cogflow", "cogflow.__main__", "cogflow.errors", "cogflow.stages"]
    for package in ("config", "files"):
        names += [f"cogflow.{package}.{path.stem}" for path in (repository / "cogflow" / package).glob("*.py") if path.stem != "__init__"]
    code = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\nsys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, check=False).returncode == 0
