"""Test that the first two steps, facts and weights, name every planted fault and nothing else. Nothing is sampled."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest

from cogflow.config.model_section import ModelConfig
from cogflow.diagnosis.config_differences import SEVERITY, compare_configs
from cogflow.diagnosis.diagnosis_input import resolve
from cogflow.diagnosis.finding import DiagnosisFinding
from cogflow.diagnosis.weight_differences import compare_weights
from tests.diagnosis.faults import CLEAN, FAULTS, Fault, Plant, World, field, planted

AUTO = ModelConfig(name="auto")


def faults_of(candidate: Path, reference: Path) -> list[DiagnosisFinding]:
    ours, theirs = resolve(candidate, AUTO, "candidate"), resolve(reference, AUTO, "reference")
    return [
        one
        for step in (compare_configs(ours, theirs), compare_weights(ours, theirs))
        for one in step.findings
        if one.faulty
    ]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_a_planted_fault_is_named_and_nothing_else_is(world: World, tmp_path: Path, fault: Fault) -> None:
    found = faults_of(planted(tmp_path / "candidate", fault.plant, world), world.pipeline)
    assert found, fault.title
    for finding in found:
        assert finding.component == fault.component and finding.name.startswith(fault.name), finding.line()
        assert finding.why and 0.5 <= finding.confidence <= 1


@pytest.mark.parametrize("plant", CLEAN.values(), ids=CLEAN)
def test_a_clean_pair_has_no_fault(world: World, tmp_path: Path, plant: Plant) -> None:
    assert [one.line() for one in faults_of(planted(tmp_path / "candidate", plant, world), world.pipeline)] == []


def test_a_finetune_of_the_base_has_no_fault(world: World) -> None:
    assert [one.line() for one in faults_of(world.pipeline, world.base)] == []


def test_another_training_is_no_fault(world: World) -> None:
    """Its samples decide whether it is worse. The same weights with the record of this training are a fault (wrong
    run).
    """
    assert [one.line() for one in faults_of(world.other / "pipeline", world.pipeline)] == []


def test_a_pipeline_with_a_planted_fault_loads(world: World, tmp_path: Path) -> None:
    """Diffusers loads a wrong scaling factor without an error."""
    folder = planted(tmp_path / "candidate", FAULTS[0].plant, world)
    faulty = diffusers.CogVideoXPipeline.from_pretrained(folder, local_files_only=True)
    sound = diffusers.CogVideoXPipeline.from_pretrained(world.pipeline, local_files_only=True)
    assert faulty.vae.config.scaling_factor == 1.15258426
    assert sound.vae.config.scaling_factor == 0.7


def test_the_recipe_for_a_new_fault_works(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Follow "Add a fault to the diagnosis" in CONTRIBUTING.md with a field that has no entry yet."""
    key = ("vae", "use_quant_conv")
    assert key not in SEVERITY
    monkeypatch.setitem(SEVERITY, key, (0.9, "Latents pass another convolution."))
    fault = Fault("another quantisation layer", field("vae", "use_quant_conv", True), *key)
    found = faults_of(planted(tmp_path / "candidate", fault.plant, world), world.pipeline)
    assert [(one.component, one.name, one.confidence) for one in found] == [(*key, 0.9)]
    assert found[0].why == "Latents pass another convolution."


def test_the_recipe_names_files_and_functions_that_exist(repository: Path) -> None:
    text = (repository / "CONTRIBUTING.md").read_text()
    section = re.search(r"^## Add a fault to the diagnosis\n(.*?)^## ", text, re.M | re.S)
    assert section is not None
    names = re.findall(r"`([\w/.]+)`", section[1])
    paths = [name for name in names if "/" in name]
    source = "".join((repository / path).read_text() for path in paths)
    assert len(paths) == 4
    assert [name for name in names if "/" not in name and name not in source] == []
