"""The command line from outside: what it prints where, its exit codes and its speed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cogflow import cli as command
from cogflow.errors import ConfigError, DataError, QualityGateError, Stopped
from cogflow.stages import SUMMARIES


def cogflow(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cogflow", *words],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["stage=train", "stage.stpes=3", "data.hieght=64"], ["2 problems", "stage.steps", "data.height"]),
        (["stage=trian"], ["Did you mean train?"]),
        (["stage=train", "stage.steps"], ["not understood"]),
        (["--halp"], ["--halp", "usage:"]),
    ],
)
def test_a_mistake_exits_2_with_one_message_and_no_traceback(
    tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    result = cogflow(*words, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert "Traceback" not in result.stderr and [part for part in parts if part not in result.stderr] == []
    assert list(tmp_path.iterdir()) == []


def test_only_rank_0_prints_an_error(tmp_path: Path) -> None:
    assert cogflow("stage=trian", cwd=tmp_path, RANK="0").stderr.count("trian") == 1
    result = cogflow("stage=trian", cwd=tmp_path, RANK="1")
    assert result.returncode == 2 and result.stderr == ""


def test_the_command_without_words_lists_the_stages(tmp_path: Path) -> None:
    result = cogflow(cwd=tmp_path)
    assert result.returncode == 0
    assert [name for name in SUMMARIES if f"stage={name} " not in result.stdout] == []
    assert "--help" in result.stdout


def test_a_command_without_a_stage_lists_the_stages_and_exits_with_2(tmp_path: Path) -> None:
    result = cogflow("run.name=x", cwd=tmp_path)
    assert result.returncode == 2 and "stage=flow " in result.stderr and "stage=NAME is missing" in result.stderr


def test_help_takes_little_processor_time(tmp_path: Path) -> None:
    """Measure processor time, which other work on the machine does not stretch. Hydra alone takes half."""
    took = []
    for _ in range(3):
        start = os.times()
        result = cogflow("stage=train", "--help", cwd=tmp_path)
        end = os.times()
        took.append(end.children_user + end.children_system - start.children_user - start.children_system)
    assert result.returncode == 0 and "stage.learning_rate=0.0004" in result.stdout
    assert "zero2_offload" in result.stdout and "optimizer states" in result.stdout
    assert min(took) < 1.0


@pytest.mark.parametrize("stage", sorted(SUMMARIES))
def test_help_knows_every_stage(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([f"stage={stage}", "--help"]) == 0
    assert SUMMARIES[stage] in capsys.readouterr().out


def test_help_on_an_unknown_stage_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["stage=exprot", "-h"]) == 2
    assert "Did you mean export?" in capsys.readouterr().err


def test_cfg_prints_what_would_run(tmp_path: Path) -> None:
    from cogflow.config.build import build

    result = cogflow("stage=train", "stage.steps=7", "--cfg", cwd=tmp_path)
    assert result.returncode == 0 and list(tmp_path.iterdir()) == []
    from omegaconf import OmegaConf

    config = build(OmegaConf.to_container(OmegaConf.create(result.stdout)))  # type: ignore[arg-type]
    assert config.stage.name == "train" and "steps: 7" in result.stdout


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __import__("cogflow").__version__


class Stage:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def run(self, config: object) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (DataError("no clips", "give some"), 2),
        (ConfigError("no"), 2),
        (QualityGateError("blurry"), 3),
        (Stopped("saved"), 75),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_exit_code(
    error: BaseException | None,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load", lambda name: Stage(error))
    assert command.main(["stage=train"]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said and str(error or "") in said
    assert list(tmp_path.iterdir()) == []


def test_a_fault_exits_1_and_its_traceback_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(command, "load", lambda name: Stage(ZeroDivisionError("by zero")))
    assert command.main(["stage=train", "run.name=x"]) == 1
    log = (tmp_path / "runs" / "x" / "cogflow.log").read_text()
    assert "rank 3" in log and "Traceback" in log and "ZeroDivisionError: by zero" in log
    assert log.strip() in capsys.readouterr().err


def test_a_log_that_cannot_be_written_does_not_hide_the_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/tiny-shapes/cogflow.log").mkdir(parents=True)
    monkeypatch.setattr(command, "load", lambda name: Stage(ZeroDivisionError("by zero")))
    assert command.main(["stage=train"]) == 1
    assert "by zero" in capsys.readouterr().err


def test_the_installed_package_finds_its_configs(tmp_path: Path, repository: Path) -> None:
    """Copy the package as a wheel lays it out: configs inside the package, nothing beside it."""
    shutil.copytree(
        repository / "cogflow", tmp_path / "site" / "cogflow", ignore=shutil.ignore_patterns("assets", "__pycache__")
    )
    shutil.copytree(repository / "configs", tmp_path / "site" / "cogflow" / "configs")
    result = cogflow("stage=train", "--cfg", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert result.returncode == 0, result.stderr
    shutil.rmtree(tmp_path / "site" / "cogflow" / "configs")
    result = cogflow("stage=train", "--cfg", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert result.returncode == 2 and "configs/config.yaml is missing" in result.stderr


def test_an_interrupt_exits_130(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom cogflow import cli as c\n"
        "class S:\n    def run(self, config):\n        print('up', flush=True)\n        time.sleep(60)\n"
        "c.load = lambda name: S()\nsys.exit(c.main(['stage=train']))"
    )
    # A shell has what it starts in the background ignore the signal, and so would this.
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    started = time.time()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130 and time.time() - started < 30
    process.stdout.close()
