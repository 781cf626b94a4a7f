"""Every planted fault is named by its facts or its weights, with nothing else accused; clean pairs are not. Nothing is sampled here."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest

from cogflow.config.model_section import ModelConfig
from cogflow.diagnosis.config_differences import compare_configs
from cogflow.diagnosis.diagnosis_input import resolve
from cogflow.diagnosis.finding import DiagnosisFinding
from cogflow.diagnosis.weight_differences import compare_weights
from tests.diagnosis.faults import CLEAN, FAULTS, Fault, Plant, World, spoiled

AUTO = ModelConfig(name="auto")


def accused(candidate: Path, reference: Path) -> list[DiagnosisFinding]:
    ours, theirs = resolve(candidate, AUTO, "candidate"), resolve(reference, AUTO, "reference")
    return [
        one
        for step in (compare_configs(ours, theirs), compare_weights(ours, theirs))
        for one in step.findings
        if one.guilty
    ]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_a_planted_fault_is_named_and_nothing_else(world: World, tmp_path: Path, fault: Fault) -> None:
    found = accused(spoiled(tmp_path / "candidate", fault.plant, world), world.pipeline)
    assert found, fault.title
    for finding in found:
        assert finding.component == fault.component and finding.name.startswith(fault.name), finding.line()
        assert finding.why and 0.5 <= finding.confidence <= 1


@pytest.mark.parametrize("plant", CLEAN.values(), ids=CLEAN)
def test_a_clean_pair_is_not_accused(world: World, tmp_path: Path, plant: Plant) -> None:
    assert [one.line() for one in accused(spoiled(tmp_path / "candidate", plant, world), world.pipeline)] == []


def test_a_finetune_of_the_base_is_no_fault(world: World) -> None:
    assert [one.line() for one in accused(world.pipeline, world.base)] == []


def test_another_training_is_no_fault_of_the_pipeline(world: World) -> None:
    """Whether it is blurrier is for its samples to say; the same weights under the record of this training are accused (wrong run)."""
    assert [one.line() for one in accused(world.other / "pipeline", world.pipeline)] == []


def test_a_planted_pipeline_still_loads(world: World, tmp_path: Path) -> None:
    """The faults are of the silent kind: diffusers takes them without a word."""
    folder = spoiled(tmp_path / "candidate", FAULTS[0].plant, world)
    assert (
        diffusers.CogVideoXPipeline.from_pretrained(folder, local_files_only=True).vae.config.scaling_factor
        == 1.15258426
    )
    assert (
        diffusers.CogVideoXPipeline.from_pretrained(world.pipeline, local_files_only=True).vae.config.scaling_factor
        == 0.7
    )
