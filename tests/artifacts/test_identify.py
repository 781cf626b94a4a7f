"""Test every kind of path with every stage that takes one: what it is identified as, or why it is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cogflow.artifacts import identify as identifying
from cogflow.artifacts.identify import PRECEDENCE, ArtifactKind, identify, kind_named
from cogflow.assemble.component_sources import find_component
from cogflow.config.config import Config
from cogflow.config.export_settings import AssembleStage
from cogflow.config.model_section import ModelConfig
from cogflow.config.sample_settings import SampleStage
from cogflow.config.setting import ARTIFACT_KINDS
from cogflow.config.train_settings import TrainStage
from cogflow.diagnosis.diagnosis_input import resolve
from cogflow.errors import CheckpointError, CogflowError, ConfigError
from cogflow.export.origin import open_origin
from cogflow.models import tiny
from cogflow.sampling.clip_files import MEDIA
from cogflow.stages.assemble import recognise
from cogflow.stages.sample import resolve_model, resolve_source
from cogflow.training.initial_weights import find_weights
from tests.artifacts.places import GOLDEN, PICTURE, PLACES, checkpoint, deepspeed, pipeline

AUTO = ModelConfig(name="auto")
KINDS = {
    "run": "run",
    "run without checkpoints": "run",
    "run with a pipeline": "run",
    "checkpoint": "checkpoint",
    "checkpoint of another name": "checkpoint",
    "pipeline": "pipeline",
    "pipeline with a picture": "pipeline",
    "pipeline named finetune-step-500": "pipeline",
    "pipeline with empty checkpoints/": "pipeline",
    "pipeline with checkpoints": "pipeline",
    "export": "export",
    "component": "component",
    "components": "components",
    "component with optimizer.bin": "component",
    "optimizer.bin beside model.safetensors": "!holds model.safetensors without the config.json",
    "SAT folder": "sat_checkpoint",
    "SAT step folder": "sat_checkpoint",
    "SAT file": "sat_checkpoint",
    "DeepSpeed folder": "deepspeed",
    "DeepSpeed folder, ZeRO 2": "deepspeed",
    "DeepSpeed folder, ZeRO 3": "deepspeed",
    "3d-vae.pt": "sat_vae",
    "video file": "videos",
    "folder of videos": "videos",
    "folder of videos with embeddings": "videos",
    "folder of frames": "frames",
    "empty folder": "!is nothing that cogflow knows. It holds nothing",
    "missing path": "!does not exist",
    "text file": "!is a file that cogflow does not know",
}
"""Place -> its kind, or ``!`` and what the refusal says."""


@dataclass(frozen=True)
class Row:
    """The expected artifact of each place by stage; ``!`` begins a part of the message that refuses it."""

    export: str
    sample: str
    assemble: str
    diagnose: str
    start: str


MODEL_FOLDER = Row("diffusers", "sampled", "as it is", "rung 5", "diffusers")
PIPELINE = MODEL_FOLDER
COMPONENT = Row("diffusers", "sampled", "as it is", "!Assemble a pipeline", "diffusers")
CHECKPOINT = Row("cogflow", "sampled", "exported", "rung 4", "cogflow")
SAT = Row("sat", "!Export it first", "exported", "!Export it first", "sat")
MEDIA_ROW = Row("!holds no transformer", "measured", "!holds no transformer", "!stage=sample", "!holds no transformer")
NO_CHECKPOINT = "!holds no checkpoint"
UNKNOWN_NAMES = "!of no layout that cogflow knows"

ROWS = {
    "run": CHECKPOINT,
    "run without checkpoints": Row(NO_CHECKPOINT, NO_CHECKPOINT, "!holds no transformer", NO_CHECKPOINT, NO_CHECKPOINT),
    "run with a pipeline": Row(NO_CHECKPOINT, NO_CHECKPOINT, "as it is", "rung 5", NO_CHECKPOINT),
    "checkpoint": CHECKPOINT,
    "checkpoint of another name": CHECKPOINT,
    "pipeline": PIPELINE,
    "pipeline with a picture": PIPELINE,
    "pipeline named finetune-step-500": PIPELINE,
    "pipeline with empty checkpoints/": PIPELINE,
    "pipeline with checkpoints": PIPELINE,
    "export": MODEL_FOLDER,
    "component": COMPONENT,
    "components": COMPONENT,
    "component with optimizer.bin": COMPONENT,
    "SAT folder": SAT,
    "SAT step folder": SAT,
    "SAT file": SAT,
    "DeepSpeed folder": Row("zero", "!Export it first", "exported", "!Export it first", "!neither heads nor positions"),
    "DeepSpeed folder, ZeRO 2": Row(UNKNOWN_NAMES, "!Export it first", "exported", "!Export it first", UNKNOWN_NAMES),
    "DeepSpeed folder, ZeRO 3": Row(UNKNOWN_NAMES, "!Export it first", "exported", "!Export it first", UNKNOWN_NAMES),
    "3d-vae.pt": Row("vae", "!Export it first", "exported", "!Export it first", "!holds no transformer"),
    "video file": MEDIA_ROW,
    "folder of videos": MEDIA_ROW,
    "folder of videos with embeddings": MEDIA_ROW,
    "folder of frames": MEDIA_ROW,
} | {name: Row(*[refusal] * 5) for name, refusal in KINDS.items() if refusal.startswith("!")}


def to_export(place: Path) -> str:
    return open_origin(identify(place, key="stage.source"), ["transformer"]).kind


def to_sample(place: Path) -> str:
    artifact = resolve_source(SampleStage(source=str(place)), place.parent)
    if artifact.kind in MEDIA:
        return "measured"
    base, transformer = resolve_model(artifact, ModelConfig(name="tiny"))
    assert (base / "vae").is_dir() and any(
        (transformer / name).is_file() for name in ("config.json", "model_index.json")
    )
    return "sampled"


def to_assemble(place: Path) -> str:
    artifact = recognise(AssembleStage(), "stage.transformer", place)
    source = find_component("transformer", "stage.transformer", artifact)
    return "exported" if source.export else "as it is"


def to_diagnose(place: Path) -> str:
    return f"rung {resolve(place, AUTO, 'candidate').rung}"


def to_start(place: Path, capfd: pytest.CaptureFixture[str]) -> str:
    find_weights(Config(stage=TrainStage(start=str(place)), model=AUTO), tiny.folder())
    printed = capfd.readouterr().out
    assert f"stage.start={place} is taken for " in printed
    return printed.partition("starting from ")[2].partition("(")[2].partition(",")[0]


@pytest.fixture(scope="module", params=PLACES)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, PLACES[request.param](tmp_path_factory.mktemp("place"))


def check(decide: Callable[[], str], expected: str) -> None:
    """``decide`` gives ``expected``, or raises an error of exit code 2 whose text holds what follows ``!``."""
    if not expected.startswith("!"):
        assert decide() == expected
        return
    with pytest.raises(CogflowError) as caught:
        decide()
    assert caught.value.exit_code == 2
    assert expected[1:] in str(caught.value)
    assert caught.value.hint


def test_each_example_is_identified(example: tuple[str, Path]) -> None:
    name, place = example
    check(lambda: identify(place).kind.value, KINDS[name])


@pytest.mark.parametrize("stage", ["export", "sample", "assemble", "diagnose", "start"])
def test_each_stage_takes_or_refuses_each_place(
    example: tuple[str, Path], stage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name, place = example
    decide: dict[str, Callable[[], str]] = {
        "export": lambda: to_export(place),
        "sample": lambda: to_sample(place),
        "assemble": lambda: to_assemble(place),
        "diagnose": lambda: to_diagnose(place),
        "start": lambda: to_start(place, capfd),
    }
    check(decide[stage], getattr(ROWS[name], stage))


def test_a_run_names_its_newest_checkpoint_and_its_step(tmp_path: Path) -> None:
    found = identify(PLACES["run"](tmp_path))
    assert [path.name for path in found.checkpoints] == ["step-000004", "step-000002"]
    assert (found.step, found.ema) == (4, False)


def test_the_step_of_a_renamed_checkpoint_is_read_from_its_content(tmp_path: Path) -> None:
    assert identify(checkpoint(tmp_path / "step-000900", step=7)).step == 7
    checkpoint(tmp_path / "run" / "checkpoints" / "best", step=9)
    assert identify(tmp_path / "run").step == 9


def test_a_checkpoint_without_trainer_json_is_known_by_its_manifest(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "saved")
    (folder / "trainer.json").unlink()
    assert identify(folder).kind is ArtifactKind.CHECKPOINT
    with pytest.raises(CheckpointError, match="trainer.json: missing"):
        open_origin(identify(folder), ["transformer"])


def test_the_line_names_the_reason_and_the_other_kinds(tmp_path: Path) -> None:
    folder = PLACES["pipeline with a picture"](tmp_path)
    assert identify(folder).line("stage.source") == (
        f"stage.source={folder} is taken for a pipeline: model_index.json is there "
        "(it could be frames, too: stage.source_kind=frames)"
    )
    assert identify(folder).line("stage.resume", has_kind_setting=False).endswith("model_index.json is there")
    plain = pipeline(tmp_path / "plain")
    assert identify(plain).line("stage.base") == (
        f"stage.base={plain} is taken for a pipeline: model_index.json is there"
    )


def test_the_user_decides_where_several_kinds_fit(tmp_path: Path) -> None:
    folder = PLACES["pipeline with checkpoints"](tmp_path)
    assert ArtifactKind.RUN in identify(folder).also
    assert identify(folder, ArtifactKind.RUN).checkpoints == (folder / "checkpoints" / "step-000004",)
    (folder / "preview.png").write_bytes(PICTURE)
    assert identify(folder, ArtifactKind.FRAMES).kind is ArtifactKind.FRAMES
    assert resolve_source(SampleStage(source=str(folder), source_kind="frames"), tmp_path).kind is ArtifactKind.FRAMES


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        (
            "run",
            "checkpoints/ with a checkpoint in it or export/, pipeline/, samples/, cache/ or metrics.jsonl is missing",
        ),
        ("checkpoint", "trainer.json and manifest.json is missing"),
        ("export", "export.json beside a component folder"),
        ("sat_vae", "a .pt file is missing"),
        ("videos", "a video (.mp4 .mov .webm .mkv) is missing"),
    ],
)
def test_a_kind_that_does_not_fit_is_refused_with_what_is_missing(tmp_path: Path, kind: str, missing: str) -> None:
    folder = pipeline(tmp_path / "pipeline")
    with pytest.raises(CheckpointError) as caught:
        identify(folder, kind_named(kind, "stage.source_kind"), key="stage.source")
    assert missing in caught.value.message
    assert "By its content it is a pipeline" in caught.value.hint and "stage.source_kind=pipeline" in caught.value.hint


def test_an_unknown_kind_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"stage.source_kind=folder is unknown") as caught:
        kind_named("folder", "stage.source_kind")
    assert all(kind.value in caught.value.hint for kind in ArtifactKind)
    assert kind_named("auto", "stage.source_kind") is None


def test_torch_files_decide_by_their_tensor_names(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save({"mixins.patch_embed.proj.weight": torch.ones(2)}, folder / "some.bin")
    (folder / "loss.png").write_bytes(PICTURE)
    assert identify(folder).kind is ArtifactKind.SAT_CHECKPOINT
    torch.save({"embeds": torch.ones(2)}, folder / "some.bin")
    assert identify(folder).kind is ArtifactKind.FRAMES
    (folder / "loss.png").unlink()
    with pytest.raises(CheckpointError, match="of no layout that cogflow knows"):
        identify(folder)


def test_several_steps_without_latest_are_listed(tmp_path: Path) -> None:
    folder = deepspeed(tmp_path)
    (folder / "latest").unlink()
    assert identify(folder).notes == (f"{folder} has no file latest; global_step7 is the only step in it.",)
    shutil.copytree(folder / "global_step7", folder / "global_step8")
    with pytest.raises(CheckpointError, match="several steps: global_step7, global_step8"):
        identify(folder)


def test_a_safetensors_file_is_refused_for_its_folder(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"1")
    with pytest.raises(CheckpointError, match="one file of a folder"):
        identify(tmp_path / "x.safetensors")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(CheckpointError, match="it is empty"):
        identify(tmp_path / "empty.txt")


def test_a_folder_of_transformers_config_and_vocabulary_holds_both(tmp_path: Path) -> None:
    shutil.copytree(tiny.folder() / "text_encoder", tmp_path / "t5")
    shutil.copytree(tiny.folder() / "tokenizer", tmp_path / "t5", dirs_exist_ok=True)
    found = identify(tmp_path / "t5")
    assert found.kind is ArtifactKind.COMPONENT and set(found.components) == {"text_encoder", "tokenizer"}


def test_large_folders_are_listed_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identifying, "MOST_ENTRIES", 5)
    for number in range(20):
        (tmp_path / f"{number:05d}.png").touch()
    assert len(identifying._Place(tmp_path).entries) == 5
    assert identify(tmp_path).kind is ArtifactKind.FRAMES


def test_every_kind_has_a_rule() -> None:
    assert {kind for rule in PRECEDENCE for kind in rule.kinds} == set(ArtifactKind)


def test_golden_sat_folders_are_sat_checkpoints() -> None:
    for name in ("2b", "5b-i2v", "1.5-5b-i2v", "5b-lora"):
        found = identify(GOLDEN / "sat" / name)
        assert (found.kind, found.step, found.root.name) == (ArtifactKind.SAT_CHECKPOINT, 500, "500"), name


def test_the_settings_offer_every_kind() -> None:
    assert set(ARTIFACT_KINDS) == {"auto", *(kind.value for kind in ArtifactKind)}


def test_the_docs_list_the_rules_in_order(repository: Path) -> None:
    rows = [line for line in (repository / "docs" / "artifacts.md").read_text().splitlines() if line.startswith("| `")]
    listed = [tuple(re.findall(r"`(\w+)`", row.split("|")[1])) for row in rows]
    assert listed == [tuple(kind.value for kind in rule.kinds) for rule in PRECEDENCE]
