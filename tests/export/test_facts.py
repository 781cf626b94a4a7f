"""Test that facts of a SAT model are resolved from their sources, and that conflicts and missing facts are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cogflow.errors import ConfigError, ConversionError
from cogflow.export.facts import resolve_facts, resolve_vae_facts
from cogflow.export.facts_from_yaml import read_yamls, transformer_values_from_yaml
from cogflow.models.family import MODEL_SPECS
from tests.export.fact_cases import (
    EVERY,
    IN_REPOSITORY,
    components,
    facts,
    infos,
    network,
    published,
    schedules,
    shaped,
    yamls,
)

COMMON = {
    "out_channels": 16,
    "patch_size": 2,
    "text_width": 32,
    "time_embed_dim": 64,
    "text_tokens": 10,
    "temporal_compression": 4,
    "in_channels": 16,
    "heads": 2,
    "head_dim": 32,
    "layers": 2,
    "ofs_embed_dim": None,
    "patch_size_t": None,
    "latent_height": 8,
    "latent_width": 12,
    "latent_frames": 3,
    "scaling_factor": 0.7,
    "snr_shift_scale": 1.0,
    "invert_scale_latents": False,
    "position": "rotary",
    "dtype": "bf16",
}
NEWER = {"patch_size_t": 2, "latent_height": 16, "latent_width": 16, "latent_frames": 4, "invert_scale_latents": True}
WANTED: dict[str, dict[str, Any]] = {
    "2b": {
        "hidden": 128,
        "head_dim": 64,
        "position": "sincos",
        "scaling_factor": 1.15258426,
        "snr_shift_scale": 3.0,
        "dtype": "fp32",
        "spatial_interpolation": 1.875,
        "temporal_interpolation": 1.0,
    },
    "5b-i2v": {"hidden": 96, "heads": 3, "in_channels": 32, "position": "learned+rotary"},
    "1.5-5b": {"hidden": 64, **NEWER},
    "1.5-5b-i2v": {"hidden": 64, "in_channels": 32, "ofs_embed_dim": 64, **NEWER},
    "5b-lora": {"hidden": 64, "lora_rank": 8, "lora_alpha": 1},
}
"""What each folder under tests/golden/sat is, by the hand that made it."""


@pytest.mark.parametrize("which", ["model", "merged", "all"])
@pytest.mark.parametrize("name", EVERY)
def test_the_facts_of_every_model_are_read(name: str, which: str) -> None:
    found = resolve_facts(infos(name), yamls(name, which))
    assert found.values() == COMMON | WANTED[name]
    assert found.family is None  # no published model is this small
    assert found.image_to_video == name.endswith("i2v")
    assert all(
        origin.startswith("checkpoint: ") or ".yaml" in origin or "diffusers'" in origin
        for _, _, origin in found.rows()
    )


def test_sources_state_where_each_fact_is_from() -> None:
    origins = {key: origin for key, _, origin in facts("1.5-5b").rows()}
    assert origins["text_width"] == "checkpoint: mixins.patch_embed.text_proj.weight [64, 32]"
    assert origins["scaling_factor"] == "configs/cogvideox1.5_5b.yaml: model.scale_factor"
    assert origins["snr_shift_scale"].endswith("shift_scale left out, 1.0 in SAT's code")
    assert origins["in_channels"].endswith("[64, 128] over patches of 2x2x2")
    assert "left out, 1 in SAT's code" in facts("5b-lora").sources["lora_alpha"]


def test_trained_with_has_the_values_of_training() -> None:
    assert facts("2b").trained_with().known() == {
        "scaling_factor": 1.15258426,
        "invert_scale_latents": False,
        "snr_shift_scale": 3.0,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "dtype": "fp32",
        "max_sequence_length": 10,
    }


@pytest.mark.parametrize(
    ("key", "value", "fact", "both"),
    [
        ("num_layers", 30, "layers", ("2 (checkpoint: transformer.layers.0 to 1", "30 (sat/5b")),
        ("num_attention_heads", 4, "heads", ("2 (checkpoint", "4 (")),
        ("hidden_size", 128, "hidden", ("64 (checkpoint", "128 (")),
        ("in_channels", 32, "in_channels", ("16 (checkpoint", "32 (")),
        ("out_channels", 8, "out_channels", ("16 (checkpoint", "8 (")),
        ("patch_size", [2, 2, 2], "patch_size_t", ("none (checkpoint", "2 (")),
        ("time_embed_dim", 512, "time_embed_dim", ("64 (checkpoint", "512 (")),
        ("ofs_embed_dim", 512, "ofs_embed_dim", ("none (checkpoint", "512 (")),
        ("latent_height", 60, "latent grid", ("540 patches", "72 rows of mixins.pos_embed.freqs_sin")),
        ("num_frames", 49, "latent grid", ("312 patches", "72 rows")),
    ],
)
def test_a_conflict_between_yaml_and_shapes_shows_both_values(
    key: str, value: Any, fact: str, both: tuple[str, str]
) -> None:
    altered = yamls("5b-lora", "merged")
    network(altered[0][1])[key] = value
    with pytest.raises(ConversionError) as refused:
        resolve_facts(infos("5b-lora"), altered)
    line = next(line for line in refused.value.message.splitlines() if line.strip().startswith(fact + ":"))
    assert both[0] in line and both[1].replace("sat/5b", "5b-lora/training_config.yaml") in line
    assert refused.value.exit_code == 2


def test_model_config_json_must_agree() -> None:
    folder = IN_REPOSITORY / "2b"
    stated = read_yamls([folder / "model_config.json"])
    assert {claim.key: claim.value for claim in transformer_values_from_yaml(*stated[0], [])} == {
        "layers": 2,
        "heads": 2,
        "hidden": 128,
    }
    assert resolve_facts(infos("2b"), [*yamls("2b"), *stated]).layers == 2
    with pytest.raises(
        ConversionError, match=r"layers: 2 \(checkpoint.*\) against 30 \(2b/model_config.json: num_layers\)"
    ):
        resolve_facts(infos("2b"), [*yamls("2b"), (stated[0][0], {**stated[0][1], "num_layers": 30})])


def test_two_conflicting_yamls_are_refused() -> None:
    altered = yamls("2b")
    altered[-1][1]["model"]["scale_factor"] = 0.7
    with pytest.raises(
        ConversionError, match=r"scaling_factor: 1.15258426 \(configs/cogvideox_2b.yaml.*0.7 \(2b/training_config.yaml"
    ):
        resolve_facts(infos("2b"), altered)


def test_all_conflicts_are_in_one_message() -> None:
    altered = yamls("2b", "merged")
    data = altered[0][1]
    network(data)["num_layers"] = 30
    schedules(data)[2]["params"]["shift_scale"] = 1.0
    data["model"]["conditioner_config"]["params"]["emb_models"][0]["params"]["max_length"] = 226
    network(data)["modules"]["pos_embed_config"]["target"] = "dit_video_concat.Rotary3DPositionEmbeddingMixin"
    del data["model"]["scale_factor"]
    with pytest.raises(ConversionError) as refused:
        resolve_facts(infos("2b"), altered)
    for part in (
        "layers: ",
        "snr_shift_scale: ",
        "text_tokens: ",
        "position: sincos",
        "No source reports: scaling_factor",
    ):
        assert part in refused.value.message


@pytest.mark.parametrize(
    ("model", "traits"),
    [
        (
            "cogvideox-2b",
            (
                "layers: 2",
                "position: rotary",
                "sincos (model=cogvideox-2b)",
                "scaling_factor: 0.7",
                "snr_shift_scale: 1.0",
            ),
        ),
        ("cogvideox1.5-5b", ("patch_size_t: none",)),
        ("cogvideox-5b-i2v", ("in_channels: 16", "learned+rotary")),
    ],
)
def test_a_requested_model_must_agree_with_the_checkpoint(model: str, traits: tuple[str, ...]) -> None:
    with pytest.raises(ConversionError) as refused:
        facts("5b-lora", family=model)
    assert all(trait in refused.value.message for trait in traits)


@pytest.mark.parametrize("key", ["scale_factor", "latent_width", "time_compressed_rate"])
def test_a_missing_fact_can_be_given(key: str) -> None:
    fact, value = {"scale_factor": ("scaling_factor", 0.7), "latent_width": ("latent_width", 12)}.get(
        key, ("temporal_compression", 4)
    )
    altered = yamls("5b-i2v", "merged")
    (altered[0][1]["model"] if key == "scale_factor" else network(altered[0][1])).pop(key)
    given: dict[str, Any] = {"latent_frames": 3} if key == "time_compressed_rate" else {}
    with pytest.raises(ConfigError, match=f"states: .*{fact}") as refused:
        resolve_facts(infos("5b-i2v"), altered, given=given)
    assert f"stage.facts.{fact}=" in refused.value.hint and "model=" in refused.value.hint
    assert resolve_facts(infos("5b-i2v"), altered, given=given | {fact: value}).values()[fact] == value


@pytest.mark.parametrize("name", EVERY)
def test_facts_without_a_source_must_be_given(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_facts(infos(name), [])
    for key in ("scaling_factor", "snr_shift_scale", "latent_height"):
        assert key in refused.value.message
    assert ("lora_alpha" in refused.value.message) == (name == "5b-lora")
    known = resolve_facts(infos(name), yamls(name))
    everything = {key: "none" if value is None else value for key, value in known.values().items()}
    assert resolve_facts(infos(name), [], given=everything).values() == COMMON | WANTED[name]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda data: network(data).update(num_layer=network(data).pop("num_layers")),
            "num_layer is unknown to SAT; num_layers is meant",
        ),
        (
            lambda data: data["model"].update(scale_facter=data["model"].pop("scale_factor")),
            "scale_facter is unknown to SAT; scale_factor",
        ),
        (lambda data: schedules(data)[0]["params"].update(shift=2.0), "params.shift is unknown to SAT"),
        (lambda data: network(data).update(num_layers="two"), "num_layers is 'two', not a whole number"),
        (lambda data: data["model"].update(scale_factor="0.7"), "scale_factor is '0.7', not a number"),
        (lambda data: network(data).update(patch_size=[2, 2]), r"patch_size is \[2, 2\]"),
        (
            lambda data: network(data).update(use_RMSNorm=True),
            "use_RMSNorm is True: diffusers has no CogVideoX like that",
        ),
        (
            lambda data: network(data)["modules"]["adaln_layer_config"]["params"].update(qk_ln=False),
            "qk_ln is False: diffusers has no",
        ),
        (lambda data: schedules(data)[1]["params"].update(post_shift=True), "post_shift is True"),
        (lambda data: schedules(data)[0].update(target="x.EDMDiscretization"), "EDMDiscretization"),
        (
            lambda data: network(data)["modules"]["lora_config"]["params"].update(r=16),
            r"lora_rank: 8 \(checkpoint.*16 \(",
        ),
        (lambda data: data["deepspeed"]["fp16"].update(enabled=True), "enables bf16 and fp16"),
        (lambda data: data["model"].update(noised_image_input=True), "image_to_video: no .* against yes"),
        (lambda data: data.update(model=[]), "model is list, not a mapping"),
    ],
)
def test_a_yaml_that_sat_cannot_run_is_refused(spoil: Any, message: str) -> None:
    altered = yamls("5b-lora", "merged")
    spoil(altered[0][1])
    with pytest.raises(ConversionError, match=message):
        resolve_facts(infos("5b-lora"), altered)


def test_types_of_given_facts_are_checked() -> None:
    with pytest.raises(ConfigError, match="stage.facts.scale_factor is unknown"):
        facts("2b", given={"scale_factor": 1.0})
    for key, value in (
        ("layers", "many"),
        ("layers", True),
        ("layers", 2.5),
        ("position", "absolute"),
        ("invert_scale_latents", 1),
    ):
        with pytest.raises(ConfigError, match=f"stage.facts.{key}="):
            facts("2b", given={key: value})
    with pytest.raises(
        ConversionError, match=r"scaling_factor: 1.15258426 .* against 0.7 \(stage.facts.scaling_factor\)"
    ):
        facts("2b", given={"scaling_factor": 0.7})
    with pytest.raises(ConfigError, match="model=cogvideox-9b is unknown"):
        facts("2b", family="cogvideox-9b")
    # No source of a checkpoint states this fact, so the user's value wins.
    assert facts("1.5-5b-i2v", given={"invert_scale_latents": False, "layers": None}).invert_scale_latents is False


@pytest.mark.parametrize("name", [name for name in MODEL_SPECS if name != "tiny"])
def test_a_published_model_needs_only_its_name_and_is_recognised_by_its_facts(name: str) -> None:
    member = MODEL_SPECS[name]
    named = resolve_facts(published(member), [], family=name)
    assert (
        named.family == name
        and named.scaling_factor == member.scaling_factor
        and named.text_tokens == member.text_tokens
    )
    assert (named.latent_height, named.latent_width) == (member.height // 8, member.width // 8)
    known = resolve_facts(
        published(member),
        [],
        given={key: "none" if value is None else value for key, value in named.values().items()},
    )
    assert known.family == name


def test_inconsistent_shapes_are_named() -> None:
    gap = {key: info for key, info in infos("5b-i2v").items() if not key.startswith("transformer.layers.0.")}
    with pytest.raises(ConversionError, match=r"checkpoint has transformer.layers.1 but not transformer.layers.0"):
        resolve_facts(gap, yamls("5b-i2v"))
    odd = infos("1.5-5b") | shaped([("mixins.patch_embed.proj.weight", (64, 100))])
    with pytest.raises(ConversionError, match=r"in_channels: .*\[64, 100\] does not divide by patches of 2x2x2"):
        resolve_facts(odd, yamls("1.5-5b"))
    with pytest.raises(ConversionError, match="no SAT transformer"):
        resolve_facts(shaped([("transformer_blocks.0.attn1.to_q.weight", (2, 2))]), [])


def test_vae_shapes_show_sizes_but_not_the_scaling_factor() -> None:
    vae = components(IN_REPOSITORY / "5b-i2v").vae
    assert vae is not None
    found = resolve_vae_facts(vae.tensors, yamls("5b-i2v"))
    assert found.values() == {
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "latent_channels": 16,
        "vae_in_channels": 3,
        "vae_out_channels": 3,
        "temporal_compression": 4,
        "scaling_factor": 0.7,
        "invert_scale_latents": False,
        "dtype": "bf16",
    }
    with pytest.raises(ConfigError, match="temporal_compression, scaling_factor, invert_scale_latents"):
        resolve_vae_facts(vae.tensors, [])
    assert resolve_vae_facts(vae.tensors, [], family="cogvideox1.5-5b").invert_scale_latents is True
    altered = yamls("5b-i2v", "merged")
    coder = altered[0][1]["model"]["first_stage_config"]["params"]["encoder_config"]["params"]
    coder.update(ch_mult=[1, 2], temporal_compress_times=8)
    with pytest.raises(ConversionError) as refused:
        resolve_vae_facts(vae.tensors, altered)
    assert (
        "block_out_channels: 32x32 (checkpoint" in refused.value.message
        and "temporal_compression: 4 (" in refused.value.message
    )
    with pytest.raises(ConversionError, match="no SAT autoencoder"):
        resolve_vae_facts(infos("2b"), [])


def test_a_yaml_decides_the_positions_of_a_2b_without_table() -> None:
    """Users of CogVideo's converter remove the position table by hand, so such files exist."""
    stripped = {key: info for key, info in infos("2b").items() if "pos_embed" not in key}
    assert resolve_facts(stripped, yamls("2b")).position == "sincos"
    with pytest.raises(ConfigError, match="position"):
        resolve_facts(stripped, [])


def test_an_unreadable_yaml_is_named(tmp_path: Path) -> None:
    for content in ("model: [", "- a list", ""):
        (tmp_path / "a.yaml").write_text(content)
        with pytest.raises(ConfigError, match="a.yaml"):
            read_yamls([tmp_path / "a.yaml"])


def test_the_stored_dtype_only_fills_a_gap_and_halves_conflict() -> None:
    wider = {name: type(info)(name, info.shape, torch.float32, info.file) for name, info in infos("5b-i2v").items()}
    assert resolve_facts(wider, yamls("5b-i2v")).dtype == "bf16"
    half = {name: type(info)(name, info.shape, torch.float16, info.file) for name, info in infos("5b-i2v").items()}
    with pytest.raises(
        ConversionError, match=r"dtype: fp16 \(checkpoint: dtype of its layers\) against bf16 \(configs/sft.yaml"
    ):
        resolve_facts(half, yamls("5b-i2v"))
    inference = (Path("inference.yaml"), {"args": {"mode": "inference", "fp16": True}})
    assert resolve_facts(infos("5b-i2v"), [*yamls("5b-i2v"), inference]).dtype == "bf16"
    model_only = [(path, data) for path, data in yamls("5b-i2v", "model") if "model" in data]
    assert resolve_facts(wider, model_only).dtype == "fp32"
