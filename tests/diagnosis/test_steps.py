"""Test the inputs of the diagnosis, the steps precision and evidence, and the page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from cogflow.config.data_section import DataConfig
from cogflow.config.model_section import ModelConfig
from cogflow.diagnosis.diagnosis_input import DiagnosisInput, resolve
from cogflow.diagnosis.finding import DiagnosisFinding, StepResult
from cogflow.diagnosis.html_page import write_page
from cogflow.diagnosis.precision import Probe, compare_precision, drawn_clips
from cogflow.diagnosis.weight_evidence import EvidenceProbe, weigh_evidence
from cogflow.errors import CheckpointError, ConfigError
from cogflow.ladder.schedule_probe import ProbeClip
from cogflow.models import loading, tiny
from cogflow.records.pipeline_records import DiagnosisRecord
from tests import small
from tests.diagnosis.faults import World
from tests.scenarios import sabotage

AUTO, CPU = ModelConfig(name="auto"), torch.device("cpu")


def measured(result: StepResult) -> dict[str, Any]:
    """Return the measurements of a step as diagnosis.json holds them."""
    values: dict[str, Any] = json.loads(json.dumps(result.measurements))
    return values


def test_a_pipeline_and_a_run_are_resolved_with_their_records(world: World) -> None:
    pipeline, run = resolve(world.pipeline, AUTO, "candidate"), resolve(world.run, AUTO, "reference")
    assert pipeline.complete
    assert run.complete
    assert pipeline.sampling is not None and pipeline.sampling.use_dynamic_cfg
    assert pipeline.expected["scaling_factor"].value == 0.7
    assert pipeline.family is not None and pipeline.family.name == "tiny"


def test_a_declared_model_is_resolved_to_its_facts() -> None:
    declared = resolve(None, ModelConfig(name="cogvideox-2b"), "reference")
    assert not declared.parts
    assert declared.expected["snr_shift_scale"].value == 3.0
    assert declared.expected["scaling_factor"].value == 1.15258426


def test_without_a_reference_the_candidates_own_record_is_the_reference(world: World) -> None:
    pipeline = resolve(world.pipeline, AUTO, "candidate")
    assert resolve(None, AUTO, "reference", pipeline).expected == pipeline.expected


def test_neither_a_path_nor_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="declares nothing"):
        resolve(None, AUTO, "reference")
    with pytest.raises(CheckpointError, match="nothing that cogflow knows"):
        resolve(tmp_path, AUTO, "candidate")


@pytest.mark.parametrize("overflows", [False, True])
def test_an_overflow_is_found_in_a_component_stored_in_fp16(tmp_path: Path, overflows: bool) -> None:
    folder = sabotage.with_overflowing_vae(tiny.folder(), tmp_path / "model") if overflows else tiny.folder()
    vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae", torch_dtype=torch.float32, use_safetensors=True)
    latents = torch.randn(1, 16, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    for stored, faulty in (("float16", overflows), ("float32", False)):
        probe = Probe("vae", 2_000_000, vae.eval, lambda model, dtype: model.decode(latents.to(dtype)).sample, stored)
        result = compare_precision([probe], 5, on_cpu=True)
        assert [(one.component, one.kind) for one in result.findings] == ([("vae", "overflow")] if faulty else [])
        assert measured(result)["vae"]["fp16"]["finite"] == (0.0 if overflows else 1.0)
        assert (measured(result)["vae"]["largest_inside"] > 65504) == overflows and measured(result)["vae"]["bf16"][
            "finite"
        ] == 1.0
    assert "not tried" in compare_precision([dataclasses.replace(probe, parameters=6 * 10**9)], 5, on_cpu=True).lines[0]


@pytest.fixture(scope="module")
def probe() -> EvidenceProbe:
    """Return the shipped transformer, and latents and embeddings of four drawn clips."""
    drawn = drawn_clips(loading.load_vae(tiny.folder()), DataConfig(), 4)
    tokenizer, encoder = loading.load_tokenizer(tiny.folder()), loading.load_text_encoder(tiny.folder())
    embeds = loading.encode_prompts(tokenizer, encoder, drawn.captions, 32)
    transformer = CogVideoXTransformer3DModel.from_pretrained(
        tiny.folder() / "transformer", torch_dtype=torch.float32
    ).eval()
    clips = [
        ProbeClip(latents, text, f"evidence:{index}")
        for index, (latents, text) in enumerate(zip(drawn.latents, embeds, strict=True))
    ]
    return EvidenceProbe(transformer, clips, CPU, torch.float32)


def with_fields(side: DiagnosisInput, scaling_factor: float, shift: float) -> DiagnosisInput:
    parts = dict(side.parts)
    parts["vae"] = dataclasses.replace(
        parts["vae"], settings=parts["vae"].settings | {"scaling_factor": scaling_factor}
    )
    parts["scheduler"] = dataclasses.replace(
        parts["scheduler"], settings=parts["scheduler"].settings | {"snr_shift_scale": shift}
    )
    return dataclasses.replace(side, parts=parts)


@pytest.mark.parametrize(
    ("factor", "shift", "named"),
    [
        (0.7, 1.0, []),
        (1.15258426, 1.0, ["scaling_factor"]),
        (0.7, 3.0, ["snr_shift_scale"]),
        (1.15258426, 3.0, ["scaling_factor", "snr_shift_scale"]),
    ],
)
def test_the_weights_show_what_they_were_trained_with(
    world: World, probe: EvidenceProbe, factor: float, shift: float, named: list[str]
) -> None:
    side = with_fields(resolve(world.base, AUTO, "candidate"), factor, shift)
    result = weigh_evidence(side, probe, factors=[], shifts=[])
    assert [one.name for one in result.findings] == named
    assert all(one.reference == {"scaling_factor": 0.7, "snr_shift_scale": 1.0}[one.name] for one in result.findings)
    assert measured(result)["scaling_factor"]["best"] == 0.7 and measured(result)["snr_shift_scale"]["best"] == 1.0


@pytest.mark.parametrize("over_time", [{}, {"patch_size_t": 2, "patch_bias": False}], ids=["1.0", "1.5"])
def test_untrained_weights_give_no_evidence(world: World, probe: EvidenceProbe, over_time: dict[str, Any]) -> None:
    torch.manual_seed(0)
    fresh = CogVideoXTransformer3DModel.from_config(small.transformer_config(**over_time)).eval()
    assert fresh.config.patch_size_t == over_time.get("patch_size_t")
    side = with_fields(resolve(world.base, AUTO, "candidate"), 1.15258426, 3.0)
    result = weigh_evidence(side, dataclasses.replace(probe, transformer=fresh), factors=[], shifts=[])
    assert (
        result.findings == []
        and measured(result)["scaling_factor"]["best"] is None
        and measured(result)["snr_shift_scale"]["best"] is None
    )


def test_the_page_is_one_file_with_findings_and_pictures(tmp_path: Path) -> None:
    finding = DiagnosisFinding(
        step="facts",
        component="vae",
        kind="config",
        name="scaling_factor",
        candidate=1.15,
        reference=0.7,
        rung=5,
        confidence=0.98,
        why="It <does> harm.",
        fix="stage.set.vae.scaling_factor=0.7",
    )
    record = DiagnosisRecord(
        agrees=False,
        verdict="Faulty.",
        findings=[finding.record()],
        notes=[],
        ruled_out=[],
        steps={"facts": {"lines": ["one"]}},
        candidate="a",
        reference="b",
        command="repair",
    )
    black = torch.full((9, 32, 48, 3), float("nan"))
    page = write_page(tmp_path, record, {"one": {"target": torch.rand(9, 32, 48, 3), "candidate": black}})
    text = page.path.read_text()
    assert text.count("data:image/png;base64") == 2
    assert "vae.scaling_factor" in text
    assert "&lt;does&gt;" in text
    assert set(page.pictures) == {"frames", "crops"}
    assert all(path.is_file() for path in page.pictures.values())


def test_the_page_without_samples_has_no_pictures(tmp_path: Path) -> None:
    record = DiagnosisRecord(True, "Nothing wrong was found.", [], [], [], {}, "a", "b", "repair")
    assert "data:image" not in write_page(tmp_path, record, {}).path.read_text()
