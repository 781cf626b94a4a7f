"""Steps of the diagnosis by themselves: sides, precision, evidence, the page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from cogflow.config.data_section import DataConfig
from cogflow.config.model_section import ModelConfig
from cogflow.diagnosis import probe_latents
from cogflow.diagnosis.diagnosis_input import DiagnosisInput, resolve
from cogflow.diagnosis.finding import DiagnosisFinding
from cogflow.diagnosis.html_page import write_page
from cogflow.diagnosis.precision import Probe, compare_precision
from cogflow.diagnosis.weight_evidence import EvidenceProbe, weigh_evidence
from cogflow.errors import CheckpointError, ConfigError
from cogflow.ladder.schedule_probe import ProbeClip
from cogflow.models import loading, tiny
from tests.diagnosis.faults import World
from tests.scenarios import sabotage

AUTO, CPU = ModelConfig(name="auto"), torch.device("cpu")


def test_a_place_is_known_for_what_it_is(world: World, tmp_path: Path) -> None:
    pipeline, run = resolve(world.pipeline, AUTO, "candidate"), resolve(world.run, AUTO, "reference")
    assert pipeline.complete and run.complete and pipeline.sampling is not None and pipeline.sampling.use_dynamic_cfg
    assert (
        pipeline.expected["scaling_factor"].value == 0.7
        and pipeline.family is not None
        and pipeline.family.name == "tiny"
    )
    declared = resolve(None, ModelConfig(name="cogvideox-2b"), "reference")
    assert (
        not declared.parts
        and declared.expected["snr_shift_scale"].value == 3.0
        and declared.expected["scaling_factor"].value == 1.15258426
    )
    assert resolve(None, AUTO, "reference", pipeline).expected == pipeline.expected
    with pytest.raises(ConfigError, match="declares nothing"):
        resolve(None, AUTO, "reference")
    with pytest.raises(CheckpointError, match="nothing that cogflow knows"):
        resolve(tmp_path, AUTO, "candidate")


@pytest.mark.parametrize("overflows", [False, True])
def test_an_overflow_is_found_where_the_file_says_fp16(tmp_path: Path, overflows: bool) -> None:
    folder = sabotage.with_overflowing_vae(tiny.folder(), tmp_path / "model") if overflows else tiny.folder()
    vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae", torch_dtype=torch.float32, use_safetensors=True)
    latents = torch.randn(1, 16, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    for stored, guilty in (("float16", overflows), ("float32", False)):
        probe = Probe("vae", 2_000_000, vae.eval, lambda model, dtype: model.decode(latents.to(dtype)).sample, stored)
        result = compare_precision([probe], 5, on_cpu=True)
        assert [(one.component, one.kind) for one in result.findings] == ([("vae", "overflow")] if guilty else [])
        assert result.facts["vae"]["fp16"]["finite"] == (0.0 if overflows else 1.0)
        assert (result.facts["vae"]["largest_inside"] > 65504) == overflows and result.facts["vae"]["bf16"][
            "finite"
        ] == 1.0
    assert "not tried" in compare_precision([dataclasses.replace(probe, parameters=6 * 10**9)], 5, on_cpu=True).lines[0]


@pytest.fixture(scope="module")
def probe() -> EvidenceProbe:
    """The shipped transformer, and latents and embeddings of four drawn clips."""
    latents, captions = probe_latents.drawn(loading.load_vae(tiny.folder()), DataConfig(), 4)
    tokenizer, encoder = loading.load_tokenizer(tiny.folder()), loading.load_text_encoder(tiny.folder())
    embeds = list(loading.encode_prompts(tokenizer, encoder, captions, 32))
    transformer = CogVideoXTransformer3DModel.from_pretrained(
        tiny.folder() / "transformer", torch_dtype=torch.float32
    ).eval()
    clips = [ProbeClip(*pair, f"evidence:{index}") for index, pair in enumerate(zip(latents, embeds, strict=True))]
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
def test_the_weights_know_what_they_were_trained_with(
    world: World, probe: EvidenceProbe, factor: float, shift: float, named: list[str]
) -> None:
    side = with_fields(resolve(world.base, AUTO, "candidate"), factor, shift)
    result = weigh_evidence(side, probe, factors=[], shifts=[])
    assert [one.name for one in result.findings] == named
    assert all(one.reference == {"scaling_factor": 0.7, "snr_shift_scale": 1.0}[one.name] for one in result.findings)
    assert result.facts["scaling_factor"]["best"] == 0.7 and result.facts["snr_shift_scale"]["best"] == 1.0


@pytest.mark.parametrize("over_time", [{}, {"patch_size_t": 2, "patch_bias": False}])
def test_weights_that_know_nothing_stay_silent(world: World, probe: EvidenceProbe, over_time: dict[str, Any]) -> None:
    torch.manual_seed(0)
    fresh = CogVideoXTransformer3DModel.from_config({**probe.transformer.config, **over_time}).eval()
    side = with_fields(resolve(world.base, AUTO, "candidate"), 1.15258426, 3.0)
    result = weigh_evidence(side, dataclasses.replace(probe, transformer=fresh), factors=[], shifts=[])
    assert (
        result.findings == []
        and result.facts["scaling_factor"]["best"] is None
        and result.facts["snr_shift_scale"]["best"] is None
    )


def test_the_page_holds_all_in_one_file(tmp_path: Path) -> None:
    finding = DiagnosisFinding(
        "facts",
        "vae",
        "config",
        "scaling_factor",
        False,
        1.15,
        0.7,
        5,
        0.98,
        "It <does> harm.",
        "stage.set.vae.scaling_factor=0.7",
    )
    found = {
        "agrees": False, "verdict": "Guilty.", "findings": [finding.as_dict()], "notes": [], "candidate": "a", "reference": "b",
        "command": "mend", "steps": {"facts": {"lines": ["one"]}},
    }  # fmt: skip
    frames = {
        "one": {"as it should be": torch.rand(9, 32, 48, 3), "candidate": torch.full((9, 32, 48, 3), float("nan"))}
    }
    page = write_page(tmp_path, found, frames)
    text = page.path.read_text()
    assert text.count("data:image/png;base64") == 2 and "vae.scaling_factor" in text and "&lt;does&gt;" in text
    assert set(page.pictures) == {"frames", "crops"} and all(path.is_file() for path in page.pictures.values())
    assert "data:image" not in write_page(tmp_path / "bare", found, {}).path.read_text()
