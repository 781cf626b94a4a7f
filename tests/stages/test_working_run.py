"""Test with real commands that nothing lands in another run, and that printed commands work in the same run."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cogflow.config.compose import compose
from cogflow.config.run_section import run_at
from tests.conftest import REPOSITORY, Command
from tests.shell_words import printed_commands, words_of

SAT = REPOSITORY / "tests/golden/sat/2b"


def content(folder: Path) -> dict[str, str]:
    """Return the hash of every file of a folder by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def steps(folder: Path) -> set[int]:
    return {json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()}


def record(folder: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{stage}.json").read_text())
    return found


@pytest.fixture
def demo(flow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the run of the demo, ``runs/tiny-shapes`` below the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(flow, tmp_path / "runs/tiny-shapes")
    return tmp_path / "runs/tiny-shapes"


@pytest.fixture
def odd(flow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run whose name has a space and an apostrophe, below another root than the default one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(flow, tmp_path / "all [my], runs/it's mine")
    return Path("all [my], runs/it's mine")


def test_an_export_of_a_foreign_checkpoint_leaves_the_demo_unchanged(demo: Path, cogflow: Command) -> None:
    before = content(demo)
    done = cogflow("stage=export", f"stage.source={SAT}", "stage.verify=off")
    assert f"working in runs/2b-export: stage.source={SAT} is in no run" in done.stdout
    assert content(demo) == before
    own = demo.parent / "2b-export"
    assert record(own, "export")["results"]["where"] == "runs/2b-export/export" and steps(own) == {500}
    assert (own / "export/transformer/config.json").is_file() and (own / "report.html").is_file()
    # The same source works in the same run, and its export is in a run now.
    again = cogflow("stage=export", f"stage.source={SAT}", "stage.verify=off")
    assert "working in runs/2b-export:" in again.stdout
    assert {path.name for path in demo.parent.iterdir()} == {"tiny-shapes", "2b-export"}


def test_a_dry_run_leaves_nothing(demo: Path, cogflow: Command) -> None:
    cogflow("stage=export", f"stage.source={SAT}", "stage.dry_run=true")
    assert [path.name for path in demo.parent.iterdir()] == ["tiny-shapes"]


def test_measured_videos_leave_the_demo_unchanged(demo: Path, cogflow: Command) -> None:
    before = content(demo)
    shutil.copytree(demo / "samples/step-000004", "videos", ignore=shutil.ignore_patterns("*.json", "*.safetensors"))
    cogflow("stage=sample", "stage.source=videos", "stage.reference=runs/tiny-shapes/samples/step-000004")
    assert content(demo) == before
    assert record(demo.parent / "videos-sample", "sample")["settings"]["run"]["name"] == "videos-sample"
    # Samples of a run are measured in that run.
    done = cogflow("stage=sample", "stage.source=runs/tiny-shapes/samples/step-000004")
    assert "working in runs/tiny-shapes: " in done.stdout and (demo / "sample.json").is_file()


def test_an_export_says_which_step_of_which_line_it_is_from(odd: Path, cogflow: Command, tmp_path: Path) -> None:
    cogflow("stage=export", f'stage.source="{odd}/checkpoints/step-000004"')
    exported = json.loads((odd / "export/export.json").read_text())
    assert (exported["run"], exported["line"], exported["step"]) == (str(tmp_path / odd), 1, 4)
    results = record(odd, "export")["results"]
    assert results["weights_from"] == {"run": str(tmp_path / odd), "line": 1, "step": 4}
    assert "from step 4 of line 1 of it&#39;s mine" in (odd / "report.html").read_text()


@pytest.mark.slow
def test_the_next_command_of_an_export_runs_as_printed(odd: Path, cogflow: Command, tmp_path: Path) -> None:
    shutil.rmtree(odd / "pipeline")
    done = cogflow("stage=export", f'stage.source="{odd}"')
    (printed,) = printed_commands(done.stdout)
    cogflow(*words_of(printed))
    assembly = json.loads((odd / "pipeline/assembly.json").read_text())
    assert assembly["verify"]["status"] == "passed"
    for origin in (assembly["made"], assembly["components"]["transformer"]):
        assert (origin["run"], origin["line"], origin["step"]) == (str(tmp_path / odd), 1, 4)
    assert "The transformer is from step 4 of line 1 of it's mine." in (odd / "pipeline/README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["all [my], runs"]


@pytest.mark.slow
def test_the_repair_command_runs_as_printed(odd: Path, cogflow: Command, tmp_path: Path) -> None:
    vae = odd / "pipeline/vae/config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"scaling_factor": 1.15258426}))
    shutil.copytree(odd / "pipeline", "given, away/pipeline")
    before = content(odd)
    quick = ["sampling.steps=2", "stage.prompts=1"]
    done = cogflow("stage=diagnose", 'stage.candidate="given, away/pipeline"', "model=tiny", *quick, code=3)
    own = Path("runs/given, away-pipeline-diagnose")
    (printed,) = printed_commands(done.stderr)
    assert json.loads((own / "diagnosis.json").read_text())["command"] == printed
    cogflow(*words_of(printed), *quick, code=3)
    repaired = json.loads((own / "repaired/vae/config.json").read_text())
    assert repaired["scaling_factor"] == 0.7 and content(odd) == before
    # A candidate in a run is diagnosed in that run, whatever its name.
    done = cogflow("stage=diagnose", f'stage.candidate="{odd}/pipeline"', "model=tiny", *quick, code=3)
    (printed,) = printed_commands(done.stderr)
    config = compose(words_of(printed))
    assert config.run == run_at(odd) and config.stage.candidate == str(odd / "pipeline")
    assert config.stage.output == str(odd / "repaired")


def test_hints_with_commands_name_the_run(odd: Path, cogflow: Command, tmp_path: Path) -> None:
    named = [f'run.root="{odd.parent}"', 'run.name="it\'s new"']
    cases = {
        ("stage=sample", f"stage.source={SAT}"): {"stage.source": str(SAT)},
        ("stage=diagnose", f"stage.candidate={SAT}"): {"stage.source": str(SAT)},
        ("stage=assemble", "stage.base=x"): {},
    }
    for words, expected in cases.items():
        (printed,) = printed_commands(cogflow(*words, *named, code=2).stderr)
        config = compose(words_of(printed))
        assert config.stage.name == "export" and config.run == run_at(odd.parent / "it's new"), printed
        assert config.stage.source == expected.get("stage.source")
    (tmp_path / "empty/samples/step-000000").mkdir(parents=True)
    (tmp_path / "empty/samples/step-000000/samples.json").write_text("{}")
    (printed,) = printed_commands(cogflow("stage=export", "stage.source=empty", code=2).stderr)
    assert compose(words_of(printed)).run == run_at(Path("empty"))


def test_an_assembly_changes_no_other_run(odd: Path, cogflow: Command) -> None:
    before = content(odd)
    words = ["stage=assemble", f'stage.transformer="{odd}/export"', "run.name=other"]
    done = cogflow(*words, code=None)
    assert done.returncode == 0 and content(odd) == before
    assert not (Path("runs/other") / "ladder.json").exists()
    assert json.loads(Path("runs/other/pipeline/assembly.json").read_text())["verify"]["status"] == "passed"
