"""Test that a command works in the run it was pointed at, and that nothing lands in another run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from cogflow.artifacts.working_run import choose_run, enclosing_run, is_run, working_in
from cogflow.cli import main
from cogflow.config.command import override
from cogflow.config.compose import compose_command
from cogflow.config.run_section import FOLDER_NAME
from cogflow.files.record_io import write_record
from cogflow.records.run_records import MachineRecord, StageRecord


def stage_record(folder: Path, stage: str) -> None:
    """Write the record that ``stage`` leaves in a run."""
    folder.mkdir(parents=True, exist_ok=True)
    record = StageRecord(
        stage=stage,
        status="done",
        started="",
        finished="",
        seconds=0.0,
        command="",
        folder="",
        inputs={},
        results={},
        settings={},
        versions={},
        machine=MachineRecord("", None, 1),
    )
    write_record(folder / f"{stage}.json", record)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder: a run ``runs/mine`` and a finished demo ``runs/tiny-shapes``, and sources outside."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "tiny-shapes"):
        run = tmp_path / "runs" / name
        stage_record(run, "train")
        for inside in ("checkpoints/step-000012/transformer", "samples/step-000012", "export/transformer", "pipeline"):
            (run / inside).mkdir(parents=True)
        (run / "checkpoints/step-000012/trainer.json").write_text("{}")
    for outside in ("ckpts/my-sat/500", "other/my-sat/500", "videos", "here/pipeline", "step-000012"):
        (tmp_path / outside).mkdir(parents=True)
    return tmp_path


def chosen(*words: str) -> str:
    return str(choose_run(compose_command(words)).folder)


IN_A_RUN = {
    "the run": "runs/mine",
    "a checkpoint": "runs/mine/checkpoints/step-000012",
    "a component of a checkpoint": "runs/mine/checkpoints/step-000012/transformer",
    "samples": "runs/mine/samples/step-000012",
    "an export": "runs/mine/export",
    "a pipeline": "runs/mine/pipeline",
}
SOURCE_KEYS = {
    "export": "stage.source",
    "sample": "stage.source",
    "diagnose": "stage.candidate",
    "assemble": "stage.transformer",
}


@pytest.mark.parametrize("stage", SOURCE_KEYS)
@pytest.mark.parametrize("source", IN_A_RUN)
def test_a_path_in_a_run_chooses_that_run(home: Path, stage: str, source: str) -> None:
    assert chosen(f"stage={stage}", f"{SOURCE_KEYS[stage]}={IN_A_RUN[source]}") == "runs/mine"


@pytest.mark.parametrize("stage", SOURCE_KEYS)
@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("ckpts/my-sat", "my-sat"),
        ("ckpts/my-sat/500", "my-sat-500"),
        ("videos", "videos"),
        ("here/pipeline", "here-pipeline"),
    ],
)
def test_a_path_in_no_run_gets_a_run_of_its_own(home: Path, stage: str, source: str, name: str) -> None:
    words = (f"stage={stage}", f"{SOURCE_KEYS[stage]}={source}")
    assert chosen(*words) == f"runs/{name}-{stage}"
    assert chosen(*words, "run.root=elsewhere") == f"elsewhere/{name}-{stage}"


@pytest.mark.parametrize("stage", [*SOURCE_KEYS, "benchmark", "prepare", "train", "flow"])
def test_a_command_without_a_path_works_in_the_default_run(home: Path, stage: str) -> None:
    assert chosen(f"stage={stage}") == "runs/tiny-shapes"
    assert chosen(f"stage={stage}", "run.root=elsewhere") == "elsewhere/tiny-shapes"


@pytest.mark.parametrize("stage", SOURCE_KEYS)
@pytest.mark.parametrize("source", ["runs/mine", "ckpts/my-sat"])
def test_a_named_run_is_always_taken(home: Path, stage: str, source: str) -> None:
    words = (f"stage={stage}", f"{SOURCE_KEYS[stage]}={source}")
    assert chosen(*words, "run.name=given") == "runs/given"
    assert chosen(*words, "run.name=tiny-shapes") == "runs/tiny-shapes"
    assert chosen(*words, "run.name=given", "run.root=elsewhere") == "elsewhere/given"
    assert chosen(*words, "debug=quick") == "runs/debug-quick"  # a file that names a run


def test_a_given_root_holds_the_run(home: Path) -> None:
    words = ("stage=export", "stage.source=runs/mine/checkpoints/step-000012")
    assert chosen(*words, "run.root=runs") == "runs/mine"
    assert chosen(*words, "run.root=elsewhere") == "elsewhere/mine-step-000012-export"


def test_assemble_works_in_the_run_of_its_output_when_the_transformer_is_in_none(home: Path) -> None:
    output = "stage.output=runs/mine/pipeline"
    assert chosen("stage=assemble", "stage.transformer=ckpts/my-sat", output) == "runs/mine"
    assert chosen("stage=assemble", output) == "runs/mine"
    assert chosen("stage=assemble", "stage.output=published") == "runs/tiny-shapes"
    assert chosen("stage=assemble", "stage.transformer=runs/tiny-shapes/export", output) == "runs/tiny-shapes"


def test_a_read_only_run_is_not_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def access(path: Path, mode: int) -> bool:
        return "mine" not in str(path)

    monkeypatch.setattr(os, "access", access)
    found = choose_run(compose_command(["stage=export", "stage.source=runs/mine"]))
    assert found.run.name == "mine-export"
    assert "which cannot be written" in found.line and "runs/mine-export" in found.line


def test_results_of_a_replaced_line_belong_to_the_run(home: Path) -> None:
    aside = home / "runs/mine/replaced/01"
    stage_record(aside, "train")
    (aside / "checkpoints/step-000020").mkdir(parents=True)
    assert enclosing_run(Path("runs/mine/replaced/01/checkpoints/step-000020")) == Path("runs/mine")


def test_a_run_is_found_from_inside_it_and_through_a_link(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "newest").symlink_to("runs/mine/checkpoints/step-000012")
    assert enclosing_run(Path("newest")) == Path("runs/mine")
    monkeypatch.chdir(home / "runs/mine")
    assert enclosing_run(Path("checkpoints/step-000012")) == home / "runs/mine"
    found = choose_run(compose_command(["stage=export", "stage.source=checkpoints/step-000012"]))
    assert found.folder == home / "runs/mine"


@pytest.mark.parametrize(
    "content",
    [
        {"metrics.jsonl": "{}\n"},
        {"checkpoints/latest": "step-1", "checkpoints/step-1/model.safetensors": ""},
        {"cache/index.json": '{"files": []}'},
        {"export.json": '{"source": "x"}', "transformer/config.json": "{}"},
        {"train.json": '{"stage": "train"}'},
        {"history.json": "[1, 2]"},
        {"samples/step-000001/video.mp4": ""},
    ],
)
def test_a_folder_of_another_program_is_no_run(tmp_path: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert not is_run(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"checkpoints/step-000001/trainer.json": "{}"},
        {"weights/step-000001/trainer.json": "{}"},
        {"samples/step-000001/samples.json": "{}"},
        {"cache/index.json": '{"version": 1, "plan": "", "fingerprint": ""}'},
        {"history.json": '{"version": 1, "lines": []}'},
        {"source.json": '{"version": 1, "stage": "export", "source": "/x"}'},
    ],
)
def test_a_run_is_recognised_by_its_content(tmp_path: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert is_run(tmp_path)


def work(*words: str) -> Path:
    """Choose the run of a command, mark it and leave a result in it; return its folder."""
    with working_in(choose_run(compose_command(words))) as place:
        (place.folder / "result").write_text("")
    return place.folder


def test_two_sources_of_one_name_have_two_runs_and_keep_them(home: Path) -> None:
    one = ("stage=export", "stage.source=ckpts/my-sat")
    two = ("stage=export", "stage.source=other/my-sat")
    first, second = work(*one), work(*two)
    assert first == Path("runs/my-sat-export")
    assert second.name.startswith("my-sat-export-") and len(second.name) == len("my-sat-export-") + 8
    assert (work(*one), work(*two)) == (first, second)
    shutil.rmtree(first)
    assert work(*two) == second
    assert json.loads((second / "source.json").read_text())["source"] == str(home / "other/my-sat")


def test_a_run_that_the_user_named_is_not_taken_for_a_source(home: Path) -> None:
    stage_record(home / "runs/my-sat-export", "train")
    assert work("stage=export", "stage.source=ckpts/my-sat").name.startswith("my-sat-export-")


def test_a_command_that_leaves_nothing_leaves_no_run(home: Path) -> None:
    shutil.rmtree(home / "runs")
    unused = choose_run(compose_command(["stage=export", "stage.source=videos"]))
    with pytest.raises(ZeroDivisionError), working_in(unused):
        raise ZeroDivisionError
    assert not (home / "runs").exists()


def test_a_folder_that_was_taken_meanwhile_is_left_to_its_source(home: Path) -> None:
    late = choose_run(compose_command(["stage=export", "stage.source=other/my-sat"]))
    work("stage=export", "stage.source=ckpts/my-sat")
    with working_in(late) as place:
        assert place.folder.name.startswith("my-sat-export-")


@pytest.mark.parametrize("name", [" .x", "a\tb", "ü" * 300, "it's = [a], b", "..."])
def test_the_run_of_an_oddly_named_source_can_be_named(home: Path, name: str) -> None:
    folder = home / name[:100]
    folder.mkdir()
    found = choose_run(compose_command(["stage=export", override("stage.source", folder)]))
    assert FOLDER_NAME.problem(found.run.name) is None
    assert found.source == folder.resolve()


def test_the_command_prints_where_it_works(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage=export", "stage.source=videos"]) == 2
    assert "working in runs/videos-export: stage.source=videos is in no run" in capsys.readouterr().out
    assert not (home / "runs/videos-export").exists()
    assert main(["stage=export", "stage.source=runs/mine", "--cfg"]) == 0
    shown = capsys.readouterr().out
    assert "working in" not in shown and "  name: mine\n" in shown
