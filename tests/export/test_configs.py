"""Test configs built from facts: classes accept every key, pipeline checks pass, and SAT's yaml states the same
facts."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from cogflow.assemble.components import PipelineComponent
from cogflow.assemble.consistency import check_components
from cogflow.assemble.expectations import ARCHITECTURE
from cogflow.errors import ConfigError, ConversionError, PipelineError
from cogflow.export import diffusers_configs, sat_tables, sat_yaml
from cogflow.export.export_plan import make_plan
from cogflow.export.facts import TransformerFacts, VaeFacts, published_facts, resolve_facts, resolve_vae_facts
from cogflow.export.facts_from_yaml import read_yamls
from cogflow.models import tiny
from cogflow.models.family import MODEL_SPECS
from cogflow.records.pipeline_records import TransformerOrigin
from tests.export.fact_cases import EVERY, IN_REPOSITORY, components, facts, infos, published, yamls
from tests.export.golden_sets import complete_folders

PUBLISHED = [name for name in MODEL_SPECS if name != "tiny"]

SCHEDULER = {
    "_class_name": "CogVideoXDDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}
"""The published scheduler_config.json of CogVideoX1.5-5B, as quoted in huggingface/finetrainers issue 120."""


def meta_shapes(cls: Any, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = cls.from_config(config) if cls is not T5EncoderModel else cls(T5Config.from_dict(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def keywords(class_name: str) -> set[str]:
    return set(inspect.signature(getattr(diffusers, class_name).__init__).parameters) - {"self"}


def vae_facts(folder: Path) -> VaeFacts:
    found = components(folder).vae
    assert found is not None
    return resolve_vae_facts(found.tensors, read_yamls([folder / "training_config.yaml"]))


@pytest.mark.parametrize("name", EVERY)
def test_the_transformer_class_has_exactly_the_converted_tensors(name: str) -> None:
    config = diffusers_configs.transformer_config(facts(name))
    source = {key.replace(".original.", "."): info for key, info in infos(name).items() if ".matrix_" not in key}
    make_plan(
        sat_tables.transformer_table(diffusers_configs.settings_of(config)),
        source,
        meta_shapes(CogVideoXTransformer3DModel, config),
    )
    assert set(diffusers_configs.settings_of(config)) == keywords("CogVideoXTransformer3DModel")


@pytest.mark.parametrize("folder", complete_folders(), ids=lambda folder: folder.name)
def test_every_config_of_a_complete_sat_folder(folder: Path) -> None:
    """Each kind of yaml gives the same facts, and every class has exactly the converted tensors."""
    parts = components(folder)
    assert parts.transformer is not None and parts.text_encoder is not None and parts.vae is not None
    merged = resolve_facts(parts.transformer.tensors, read_yamls([folder / "training_config.yaml"]))
    per_model = resolve_facts(parts.transformer.tensors, read_yamls(sorted((folder / "configs").glob("*.yaml"))))
    assert merged.values() == per_model.values()
    config = diffusers_configs.transformer_config(merged)
    source = {
        key.replace(".original.", "."): info for key, info in parts.transformer.tensors.items() if ".matrix_" not in key
    }
    make_plan(
        sat_tables.transformer_table(diffusers_configs.settings_of(config)),
        source,
        meta_shapes(CogVideoXTransformer3DModel, config),
    )
    config = diffusers_configs.vae_config(vae_facts(folder))
    make_plan(
        sat_tables.vae_table(config, parts.vae.tensors), parts.vae.tensors, meta_shapes(AutoencoderKLCogVideoX, config)
    )
    config = diffusers_configs.t5_config(parts.text_encoder.tensors)
    make_plan(sat_tables.text_encoder_table(config, list(parts.text_encoder.tensors)), parts.text_encoder.tensors)
    assert sat_yaml.model_config(diffusers_configs.transformer_config(merged)) == json.loads(
        (folder / "model_config.json").read_text()
    )


def test_the_vae_class_has_exactly_the_converted_tensors() -> None:
    found = components(IN_REPOSITORY / "5b-i2v").vae
    assert found is not None
    config = diffusers_configs.vae_config(vae_facts(IN_REPOSITORY / "5b-i2v"))
    make_plan(sat_tables.vae_table(config, found.tensors), found.tensors, meta_shapes(AutoencoderKLCogVideoX, config))
    assert set(diffusers_configs.settings_of(config)) == keywords("AutoencoderKLCogVideoX")


def test_the_text_encoder_config_follows_from_shapes() -> None:
    found = components(IN_REPOSITORY / "5b-i2v").text_encoder
    assert found is not None
    config = diffusers_configs.t5_config(found.tensors, "bf16")
    wanted = {
        "d_model": 32,
        "d_ff": 64,
        "d_kv": 16,
        "num_heads": 2,
        "num_layers": 1,
        "vocab_size": 100,
        "relative_attention_num_buckets": 32,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "layer_norm_epsilon": 1e-6,
        "dtype": "bfloat16",
    }
    assert {key: config[key] for key in wanted} == wanted
    model = T5EncoderModel(T5Config.from_dict(config))
    assert model.encoder.embed_tokens.weight.data_ptr() == model.shared.weight.data_ptr()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {name: info.shape for name, info in found.tensors.items()}
    with pytest.raises(ConversionError, match="relative_attention_bias.weight missing"):
        diffusers_configs.t5_config({name: info for name, info in found.tensors.items() if "relative" not in name})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_get_the_published_values(name: str) -> None:
    member = MODEL_SPECS[name]
    known = resolve_facts(published(member), [], family=name)
    config = diffusers_configs.transformer_config(known)
    assert {key: config[key] for key in ARCHITECTURE} == {
        key: getattr(member, field) for key, field in ARCHITECTURE.items()
    }
    assert (config["sample_frames"], config["max_text_seq_length"], config["time_embed_dim"]) == (
        member.frames,
        member.text_tokens,
        512,
    )
    assert (config["norm_eps"], config["spatial_interpolation_scale"], config["patch_bias"]) == (
        1e-5,
        1.875,
        "1.5" not in name,
    )
    scheduler = diffusers_configs.scheduler_config(known)
    assert {key: scheduler[key] for key in member.scheduler_config()} == member.scheduler_config()
    kind = "CogVideoXImageToVideoPipeline" if member.image_to_video else "CogVideoXPipeline"
    assert diffusers_configs.model_index_config(known)["_class_name"] == kind
    assert diffusers_configs.model_index_config(known)["scheduler"] == ["diffusers", scheduler["_class_name"]]


def test_published_facts_give_the_config_of_the_shipped_tiny_model() -> None:
    """The published facts alone, without a checkpoint, give the config of each model."""
    written = diffusers_configs.transformer_config(published_facts("tiny"))
    shipped = CogVideoXTransformer3DModel.load_config(tiny.folder() / "transformer")
    assert diffusers_configs.settings_of(written) == diffusers_configs.settings_of(shipped)
    for name in PUBLISHED:
        known = resolve_facts(published(MODEL_SPECS[name]), [], family=name)
        assert diffusers_configs.transformer_config(published_facts(name)) == diffusers_configs.transformer_config(
            known
        )
    with pytest.raises(ConfigError, match="auto"):
        published_facts("auto")


@pytest.mark.parametrize("class_name", diffusers_configs.SCHEDULER_CLASSES)
def test_scheduler_config_equals_the_published_one_and_loads_in_both_classes(class_name: str) -> None:
    config = diffusers_configs.scheduler_config(facts("1.5-5b"), class_name)
    assert {key: value for key, value in config.items() if key != "_diffusers_version"} == SCHEDULER | {
        "_class_name": class_name
    }
    assert set(diffusers_configs.settings_of(config)) == keywords(class_name)
    table = (
        getattr(diffusers, class_name)
        .from_config(diffusers_configs.scheduler_config(facts("2b"), class_name))
        .alphas_cumprod
    )
    # logSNR shifted by -log 3, rescaled to end at zero
    assert table[-1] == 0 and 0.997 < table[0] < 0.998


def pipeline(
    known: TransformerFacts, autoencoder: VaeFacts, training: TransformerOrigin
) -> dict[str, PipelineComponent]:
    vocabulary = json.loads((tiny.folder() / "text_encoder" / "config.json").read_text())
    settings = {
        "transformer": diffusers_configs.transformer_config(known),
        "vae": diffusers_configs.vae_config(autoencoder),
        "scheduler": diffusers_configs.scheduler_config(known),
        "text_encoder": vocabulary | {"d_model": known.text_width},
        "tokenizer": {},
    }
    return {
        name: PipelineComponent(
            name,
            tiny.folder() / name,
            str(config.get("_class_name", "T5")),
            config,
            training=training if name == "transformer" else TransformerOrigin(),
        )
        for name, config in settings.items()
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_export_passes_the_pipeline_checks(name: str) -> None:
    """The checks pass for the export and fail with another model's scheduler."""
    known = resolve_facts(published(MODEL_SPECS[name]), [], family=name)
    mini = components(IN_REPOSITORY / "5b-i2v").vae
    assert mini is not None
    autoencoder = resolve_vae_facts(mini.tensors, [], family=name)
    training = TransformerOrigin(family=known.family, trained_with=known.trained_with())
    parts = pipeline(known, autoencoder, training)
    parts["vae"].settings["block_out_channels"] = [128, 256, 256, 512]  # the test checkpoint has only two levels
    checks = check_components(parts, [])
    assert checks.expected["scaling_factor"] == MODEL_SPECS[name].scaling_factor
    parts["scheduler"].settings["snr_shift_scale"] = 2.0
    with pytest.raises(PipelineError, match=r"snr_shift_scale is 2.0 .*; the transformer was trained with"):
        check_components(parts, [])


@pytest.mark.parametrize("name", EVERY)
def test_the_written_sat_yaml_states_the_same_facts(name: str) -> None:
    first = facts(name)
    config, scheduler = diffusers_configs.transformer_config(first), diffusers_configs.scheduler_config(first)
    autoencoder = vae_facts(IN_REPOSITORY / "5b-i2v")
    model = sat_yaml.model_yaml(
        config, scheduler, diffusers_configs.vae_config(autoencoder) | {"scaling_factor": first.scaling_factor}
    )
    merged = yaml.safe_load(yaml.safe_dump(sat_yaml.training_config(model, first.dtype)))
    plain = {key: info for key, info in infos(name).items() if ".matrix_" not in key}
    again = resolve_facts(plain, [(Path("configs/model.yaml"), model), (Path("training_config.yaml"), merged)])
    lora = ("lora_rank", "lora_alpha")
    assert again.values() == {key: value for key, value in first.values().items() if key not in lora}
    assert sat_yaml.model_config(config) == json.loads((IN_REPOSITORY / name / "model_config.json").read_text())
    mini = components(IN_REPOSITORY / "5b-i2v").vae
    assert mini is not None
    assert resolve_vae_facts(mini.tensors, [(Path("model.yaml"), model)]).block_out_channels == (32, 32)


@pytest.mark.parametrize("name", ["2b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_the_network_section_equals_sats(name: str) -> None:
    """The written yaml has the keys and targets of the yaml that SAT ran with."""
    config, scheduler = (
        diffusers_configs.transformer_config(facts(name)),
        diffusers_configs.scheduler_config(facts(name)),
    )
    mini = diffusers_configs.vae_config(vae_facts(IN_REPOSITORY / "5b-i2v"))
    written = sat_yaml.model_yaml(config, scheduler, mini)["model"]
    theirs = next(data["model"] for _, data in yamls(name, "merged"))
    assert written["network_config"] == theirs["network_config"]
    for section in ("denoiser_config", "sampler_config", "loss_fn_config", "conditioner_config"):
        assert written[section].keys() == theirs[section].keys()
        assert written[section]["target"] == theirs[section]["target"]


def test_settings_that_sat_does_not_have_are_refused() -> None:
    config, scheduler = (
        diffusers_configs.transformer_config(facts("2b")),
        diffusers_configs.scheduler_config(facts("2b")),
    )
    mini = diffusers_configs.vae_config(vae_facts(IN_REPOSITORY / "5b-i2v"))
    with pytest.raises(ConversionError, match="prediction_type is epsilon, SAT's is v_prediction"):
        sat_yaml.model_yaml(config, scheduler | {"prediction_type": "epsilon"}, mini)
    with pytest.raises(ConversionError, match=r"block_out_channels are \[32, 48\]"):
        sat_yaml.model_yaml(config, scheduler, mini | {"block_out_channels": [32, 48]})
