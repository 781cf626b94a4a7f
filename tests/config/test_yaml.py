"""Every yaml file is composed, built and checked; a file that no case covers fails the test."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cogflow.artifacts.identify import AUTO, ArtifactKind
from cogflow.config import data_section, model_section
from cogflow.config.build import as_yaml, check, section_names
from cogflow.config.compose import compose, configs_folder, groups
from cogflow.config.config import STAGES, Config
from cogflow.config.diagnose_settings import FlowStage
from cogflow.config.export_settings import AssembleStage, ExportStage
from cogflow.config.setting import ARTIFACT_KINDS, help_of
from cogflow.config.train_settings import TrainStage
from cogflow.data import shapes
from cogflow.errors import ConfigError
from cogflow.models.family import MODEL_SPECS

PLACES = ["model.path=/model", "data.path=/clips"]
"""Settings that the real models and your own clips need beside the yaml files."""

CASES = {
    f"{group}/{choice}": [f"{group}={choice}"]
    for group, choices in groups().items()
    if group != "local"
    for choice in choices
}


def words(case: str) -> list[str]:
    group = case.split("/")[0]
    stage = [] if group in ("stage", "experiment") else ["stage=assemble" if case == "model/auto" else "stage=flow"]
    return [*CASES[case], *stage, *PLACES]


@pytest.mark.parametrize("case", sorted(CASES))
def test_each_choice_of_a_group_composes(case: str) -> None:
    config = compose(words(case))
    section, choice = case.split("/")
    if section in ("stage", "model", "data"):
        assert getattr(config, section).name == choice
    assert as_yaml(config)


def test_no_file_is_left_out() -> None:
    files = {
        path.relative_to(configs_folder()).as_posix()
        for path in configs_folder().rglob("*.y*ml")
        if path.parent.name != "local"
    }
    assert files == {f"{case}.yaml" for case in CASES} | {"config.yaml"}
    assert len(files) > 30


@pytest.mark.parametrize("stage", sorted(STAGES))
@pytest.mark.parametrize("debug", groups()["debug"])
def test_each_debug_setting_works_with_each_stage(stage: str, debug: str) -> None:
    assert compose([f"stage={stage}", f"debug={debug}"]).run.name == f"debug-{debug}"


@pytest.mark.parametrize("experiment", groups()["experiment"])
@pytest.mark.parametrize("stage", ["flow", "prepare", "train", "export", "assemble", "sample"])
def test_each_experiment_works_with_each_stage(stage: str, experiment: str) -> None:
    assert compose([f"experiment={experiment}", f"stage={stage}", *PLACES]).stage.name == stage


def test_every_published_model_has_its_number_of_parameters() -> None:
    """The names that the check knows equal the tables that it must not import, and the yaml files."""
    assert set(model_section.MODELS) == {*MODEL_SPECS, "auto"} == set(groups()["model"])
    assert set(data_section.COLOURS) == set(shapes.COLOURS)
    assert set(data_section.SHAPES) == set(shapes.SHAPES)
    assert set(data_section.MOTIONS) == set(shapes.MOTIONS)
    assert set(ARTIFACT_KINDS) == {AUTO, *(kind.value for kind in ArtifactKind)}


@pytest.mark.parametrize("name", sorted(set(MODEL_SPECS) - {"tiny"}))
def test_a_model_brings_its_native_size(name: str) -> None:
    data, facts = compose([f"model={name}", "stage=train", *PLACES]).data, MODEL_SPECS[name]
    assert (data.frames, data.height, data.width, data.fps) == (facts.frames, facts.height, facts.width, facts.fps)


def sections() -> list[type]:
    """Every dataclass that holds keys: the sections, the stages and what is nested in these."""
    kinds = [*section_names().values(), *STAGES.values()]
    for kind in kinds:
        kinds += [inner for inner in section_names(kind).values() if inner not in kinds]
    return kinds


def test_every_setting_has_a_help_text() -> None:
    kinds = sections()
    missing = [
        f"{kind.__name__}.{field.name}" for kind in kinds for field in dataclasses.fields(kind) if not help_of(field)
    ]
    assert missing == []
    assert len(kinds) == 18


def test_help_texts_are_sentences() -> None:
    texts = {
        f"{kind.__name__}.{field.name}": help_of(field) for kind in sections() for field in dataclasses.fields(kind)
    }
    assert [name for name, text in texts.items() if not text.endswith(".")] == []


def test_the_defaults_of_every_stage_pass_all_checks() -> None:
    for kind in STAGES.values():
        check(Config(stage=kind()))


def test_the_demo_runs_with_all_defaults() -> None:
    assert compose(["stage=flow"]) == Config(stage=FlowStage())


def test_a_recipe_reaches_the_training_inside_flow() -> None:
    stage = compose(["experiment=cogvideox_5b_sft", "stage=flow", "stage.train.steps=7", *PLACES]).stage
    assert isinstance(stage, FlowStage)
    assert stage.train.learning_rate == 1e-5 and stage.train.steps == 7


def test_an_experiment_selects_its_stage() -> None:
    assert isinstance(compose(["experiment=cogvideox_5b_sft", *PLACES]).stage, TrainStage)


def test_export_and_assemble_look_at_the_files() -> None:
    for name, kind in (("export", ExportStage), ("assemble", AssembleStage)):
        config = compose([f"stage={name}"])
        assert isinstance(config.stage, kind) and config.model.name == "auto"
        assert compose([f"stage={name}", "model=tiny"]).model.name == "tiny"
    assert compose(["stage=flow"]).model.name == "tiny"


def test_settings_of_this_machine_are_laid_over_the_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from cogflow.config import compose as module

    copy = shutil.copytree(configs_folder(), tmp_path / "configs")
    (copy / "local" / "default.yaml").write_text(
        "# @package _global_\nrun:\n  root: /big/disk\nstages:\n  train:\n    keep_last: 9\n"
    )
    monkeypatch.setattr(module, "configs_folder", lambda: copy)
    config = module.compose(["stage=train"])
    assert config.run.root == "/big/disk" and isinstance(config.stage, TrainStage) and config.stage.keep_last == 9
    (copy / "local" / "default.yaml").write_text(
        "# @package _global_\nstages:\n  train:\n    keep_lst: 9\n  trian: {}\n"
    )
    with pytest.raises(ConfigError) as caught:
        module.compose(["stage=prepare"])
    assert (
        "stages.train.keep_lst=9" in str(caught.value)
        and "keep_last" in str(caught.value)
        and "stages.trian" in str(caught.value)
    )
    (copy / "local" / "default.yaml").write_text("run: [\n")
    with pytest.raises(ConfigError, match="local"):
        module.compose(["stage=prepare"])
