"""Follow the recipes of CONTRIBUTING.md in a copy of the package, and run the command line of the copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def copy(tmp_path: Path, repository: Path) -> Path:
    """A folder with a copy of the package and of its configs."""
    shutil.copytree(
        repository / "cogflow", tmp_path / "site" / "cogflow", ignore=shutil.ignore_patterns("assets", "__pycache__")
    )
    shutil.copytree(repository / "configs", tmp_path / "site" / "configs")
    return tmp_path / "site"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} contains {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new), encoding="utf-8")


def cogflow(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cogflow", *words],
        cwd=copy.parent,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_setting_that_is_added_has_help_a_default_and_a_rule(copy: Path, repository: Path) -> None:
    declaration = '    frame_stride: int = setting(1, help="Use every n-th frame of a clip.", rule=at_least(1))\n'
    assert declaration in (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    anchor = "    frames: int = setting(9,"
    edit(copy / "cogflow" / "config" / "data_section.py", anchor, declaration + anchor)

    shown = cogflow(copy, "stage=train", "--help")
    (line,) = (line for line in shown.stdout.splitlines() if "data.frame_stride=1" in line)
    assert "Use every n-th frame of a clip. [1 or more]" in line

    used = cogflow(copy, "stage=train", "--cfg")
    assert used.returncode == 0 and "frame_stride: 1" in used.stdout

    for value, answer in (("0", "it should be 1 or more"), ("two", "it should be a whole number")):
        refused = cogflow(copy, "stage=train", f"data.frame_stride={value}", "--cfg")
        assert refused.returncode == 2 and f"data.frame_stride={value}: {answer}" in refused.stderr

    misspelt = cogflow(copy, "stage=train", "data.frame_strid=2", "--cfg")
    assert misspelt.returncode == 2 and "Did you mean data.frame_stride?" in misspelt.stderr


def test_a_setting_without_a_help_text_cannot_be_declared() -> None:
    from cogflow.config.setting import setting

    with pytest.raises(TypeError, match="help"):
        setting(1)  # type: ignore[call-arg]


def test_a_stage_that_is_added_runs_with_its_settings(copy: Path) -> None:
    package = copy / "cogflow"
    (package / "stages" / "hello.py").write_text(
        "from cogflow.config.config import Config\n"
        "from cogflow.config.hello_settings import HelloStage\n\n\n"
        "def run(config: Config[HelloStage]) -> None:\n"
        "    print(f'hello {config.stage.whom}')\n"
    )
    (package / "config" / "hello_settings.py").write_text(
        "from dataclasses import dataclass\n\n"
        "from cogflow.config.setting import NOT_EMPTY, setting\n\n\n"
        "@dataclass(frozen=True)\n"
        "class HelloStage:\n"
        "    name: str = setting('hello', help='Chosen by stage=hello.')\n"
        "    whom: str = setting('world', help='Whom to greet.', rule=NOT_EMPTY)\n"
    )
    config = package / "config" / "config.py"
    edit(
        config,
        "from cogflow.config.model_section",
        "from cogflow.config.hello_settings import HelloStage\nfrom cogflow.config.model_section",
    )
    edit(config, "BenchmarkStage,\n    )", "BenchmarkStage, HelloStage,\n    )")
    edit(
        package / "stages" / "__init__.py",
        "SUMMARIES: dict[str, str] = {",
        'SUMMARIES: dict[str, str] = {\n    "hello": "greet",',
    )
    (copy / "configs" / "stage" / "hello.yaml").write_text("# greet\nname: hello\n")

    shown = cogflow(copy, "stage=hello", "--help")
    assert "stage.whom=world" in shown.stdout and "Whom to greet. [not empty]" in shown.stdout
    done = cogflow(copy, "stage=hello", "stage.whom=you")
    assert (done.returncode, done.stdout) == (0, "hello you\n"), done.stderr
    assert cogflow(copy, "stage=hello", "stage.whom=''").returncode == 2
