"""Test rules of the repository: no code in configs, no unpickling, complete lists of stages, scripts and pins."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from cogflow.config.config import STAGES
from cogflow.stages import SUMMARIES


def sources(repository: Path) -> list[Path]:
    return sorted((repository / "cogflow").rglob("*.py"))


def test_configs_name_no_code(repository: Path) -> None:
    yamls = sorted((repository / "configs").rglob("*.yaml"))
    assert len(yamls) > 20
    assert [path.name for path in [*yamls, *sources(repository)] if "_target_" in path.read_text("utf-8")] == []


def test_nothing_is_unpickled_or_run(repository: Path) -> None:
    pattern = re.compile(
        r"weights_only\s*=\s*False|^\s*import pickle|pickle\.loads?\("
        r"|(?<!\.)\b(?:eval|exec)\(|trust_remote_code\s*=\s*True",
        re.M,
    )
    assert pattern.search("torch.load(path, weights_only=False)") and not pattern.search("model.eval()")
    assert {path.name: hits for path in sources(repository) if (hits := pattern.findall(path.read_text("utf-8")))} == {}


def test_every_stage_is_listed_and_configured(repository: Path) -> None:
    assert set(SUMMARIES) == set(STAGES)
    assert {path.stem for path in (repository / "configs" / "stage").glob("*.yaml")} == set(STAGES)


def test_every_stage_has_its_module(repository: Path) -> None:
    modules = {path.stem for path in (repository / "cogflow" / "stages").glob("*.py")} - {"__init__"}
    assert modules == set(STAGES)


def test_the_readme_gives_two_commands_that_exist(repository: Path) -> None:
    text = (repository / "README.md").read_text("utf-8")
    commands = re.findall(r"^bash (launch/\w+\.sh)$", text, re.M)
    assert {"launch/demo.sh", "launch/test.sh"} <= set(commands)
    assert "stage=flow" in (repository / "launch/demo.sh").read_text("utf-8")
    assert "pytest" in (repository / "launch/test.sh").read_text("utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "demo.sh",
        "test.sh",
        "install.sh",
        "train_node.sh",
        "torchrun.sh",
        "hostfile.sh",
        "slurm.sh",
        "slurm_array.sh",
        "../.ci/run",
    ],
)
def test_scripts_can_run(repository: Path, name: str) -> None:
    path = repository / "launch" / name
    assert os.access(path, os.X_OK)
    assert path.read_text("utf-8").startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in path.read_text("utf-8")


def test_constraints_pin_every_dependency(repository: Path) -> None:
    """Each dependency has an exact version for every Python; torch has no local label, so GPUs get a CUDA build."""
    asked = re.findall(r'^    "([A-Za-z0-9-]+)[=<>]', (repository / "pyproject.toml").read_text("utf-8"), re.M)
    assert {"torch", "pytest"} <= set(asked)  # of the package and of the dev extra
    lines = [
        line for line in (repository / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")
    ]
    pins: dict[str, list[str]] = {}
    for line in lines:
        match = re.fullmatch(r'([a-z0-9-]+)==([\w.]+)( ; python_version (?:<|>=) "3\.11")?', line)
        assert match, line
        pins.setdefault(match[1], []).append(match[3] or "")
    assert len(asked) > 20
    for name in asked:
        found = pins.get(name.lower(), [])
        assert found == [""] or len(found) == 2, name


def test_the_wheel_takes_every_group_but_the_local_one(repository: Path) -> None:
    taken = re.findall(
        r'^"configs/(\S+)" = "cogflow/configs/\1"$', (repository / "pyproject.toml").read_text("utf-8"), re.M
    )
    assert sorted(taken) == sorted({path.name for path in (repository / "configs").iterdir()} - {"local"})
