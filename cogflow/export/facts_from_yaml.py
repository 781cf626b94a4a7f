"""Facts about a model in SAT's yaml files: the per-model yaml and the merged ``training_config.yaml`` of a run.

Both hold the same ``model`` section; the merged file adds ``args``, ``data`` and ``deepspeed``. A key that a yaml
leaves out has the default of SAT's code; the reported source says so. Two defaults are not used: ``scale_factor``
(SAT's is 1.0, which no CogVideoX has) and the text encoder's ``max_length``. Source: zai-org/CogVideo ``sat/`` at
v1.0 and main: diffusion_video.py, dit_video_concat.py, discretizer.py; SAT's lora2.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cogflow.errors import ConfigError
from cogflow.export.reported_values import ReportedValue
from cogflow.files.bounded_parsing import read_yaml_file
from cogflow.files.record_io import ForeignObject
from cogflow.weights.foreign import SIZES

SCHEDULE = {
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "num_timesteps": 1000,
    "keep_start": False,
    "post_shift": False,
}
"""Parameters of SAT's noise schedule that diffusers' schedulers cannot change; other values are refused."""

_SIZE_KEYS = (("num_layers", "layers"), ("num_attention_heads", "heads"), ("hidden_size", "hidden"))
_NETWORK_NUMBERS = (
    *_SIZE_KEYS,
    ("in_channels", "in_channels"),
    ("out_channels", "out_channels"),
    ("time_embed_dim", "time_embed_dim"),
    ("ofs_embed_dim", "ofs_embed_dim"),
    ("latent_height", "latent_height"),
    ("latent_width", "latent_width"),
    ("time_compressed_rate", "temporal_compression"),
)
"""Key of ``network_config.params`` and the fact that it states."""

# Keys that SAT reads in each section, to recognise misspelled ones.
_TOP = ["model", "args", "data", "deepspeed"]
_ENGINE = [
    "scale_factor",
    "disable_first_stage_autocast",
    "latent_input",
    "noised_image_input",
    "noised_image_all_concat",
    "noised_image_dropout",
    "augmentation_dropout",
    "log_keys",
    "denoiser_config",
    "network_config",
    "conditioner_config",
    "first_stage_config",
    "loss_fn_config",
    "sampler_config",
]
_NETWORK = [
    "transformer_args",
    "num_frames",
    "time_compressed_rate",
    "latent_width",
    "latent_height",
    "patch_size",
    "in_channels",
    "out_channels",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "elementwise_affine",
    "time_embed_dim",
    "num_classes",
    "modules",
    "input_time",
    "adm_in_channels",
    "parallel_output",
    "height_interpolation",
    "width_interpolation",
    "time_interpolation",
    "use_SwiGLU",
    "use_RMSNorm",
    "zero_init_y_embed",
    "ofs_embed_dim",
    "dtype",
]
_POSITION = [
    "hidden_size_head",
    "text_length",
    "theta",
    "rot_v",
    "learnable_pos_embed",
    "height_interpolation",
    "width_interpolation",
    "time_interpolation",
]
_CODER = [
    "double_z",
    "z_channels",
    "resolution",
    "in_channels",
    "out_ch",
    "ch",
    "ch_mult",
    "attn_resolutions",
    "num_res_blocks",
    "dropout",
    "gather_norm",
    "temporal_compress_times",
    "resamp_with_conv",
    "pad_mode",
]
_LORA = ["r", "lora_alpha", "lora_dropout", "layer_range", "layer_num", "qlora", "cross_layer_range"]


def read_yamls(paths: Iterable[Path]) -> list[tuple[Path, ForeignObject]]:
    """Return (path, content) of yaml files. Raises :class:`ConfigError` for a file that is unreadable or no mapping."""
    found: list[tuple[Path, ForeignObject]] = []
    for path in paths:
        try:
            content = read_yaml_file(Path(path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as yaml: {error}", "Repair it, or move it away.") from error
        if not isinstance(content, dict):
            raise ConfigError(
                f"{path} holds no mapping.",
                "SAT's yaml files have model:, args:, data: or deepspeed: at the top level.",
            )
        found.append((Path(path), content))
    return found


class YamlSection:
    """One mapping of a yaml file. ``known``: the keys that SAT reads there; a key similar to one of them is a
    problem."""

    def __init__(self, file: str, path: str, data: Any, known: Collection[str], problems: list[str]) -> None:
        self.file = file
        self.path = path
        self.problems = problems
        if data is not None and not isinstance(data, Mapping):
            problems.append(f"{file}: {path} is {type(data).__name__}, not a mapping")
        self.data: ForeignObject = data if isinstance(data, Mapping) else {}
        for name in self.data:
            close = difflib.get_close_matches(str(name), known, 1, 0.85) if name not in known else []
            if close and close[0] not in self.data:
                problems.append(f"{file}: {path}.{name} is unknown to SAT; {close[0]} is meant?")

    def section(self, name: str, known: Collection[str]) -> YamlSection:
        """Return the mapping ``name`` of this one, empty if there is none; ``a.b`` is the mapping b of mapping a."""
        data: Any = self.data
        for part in name.split("."):
            data = data.get(part) if isinstance(data, Mapping) else None
        return YamlSection(self.file, f"{self.path}.{name}", data, known, self.problems)

    def source(self, key: str) -> str:
        """Return the place of a key, for messages."""
        return f"{self.file}: {self.path}.{key}" if self.path else f"{self.file}: {key}"

    def target(self) -> str:
        """Return the name of the class that a section with ``target`` and ``params`` describes; empty if there is
        none."""
        return str(self.data.get("target", "")).rpartition(".")[2]

    def number(
        self, name: str, fact: str, *, whole: bool = True, default: float | None = None
    ) -> Iterator[ReportedValue]:
        """Yield the value of the key ``name`` for a fact. ``default``: SAT's default for a key that is left out."""
        value = self.data.get(name)
        if value is None:
            if default is not None and self.data:
                yield ReportedValue(fact, default, f"{self.source(name)} left out, {default} in SAT's code")
        elif isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            expected = "a whole number" if whole else "a number"
            self.problems.append(f"{fact}: {self.source(name)} is {value!r}, not {expected}")
        else:
            yield ReportedValue(fact, value, self.source(name))


def transformer_values_from_yaml(path: Path, data: ForeignObject, problems: list[str]) -> list[ReportedValue]:
    """Return the values of one yaml for the facts of the transformer and of its training.

    ``problems`` receives what cannot be read or converted. SAT's ``model_config.json``, which has only sizes, is
    read, too.
    """
    if path.name == SIZES:
        section = YamlSection(_file_and_folder(path), "", data, list(data), problems)
        return [value for name, fact in _SIZE_KEYS for value in section.number(name, fact)]
    model = _model_section(path, data, problems)
    network = model.section("network_config.params", _NETWORK)
    values = [value for name, fact in _NETWORK_NUMBERS for value in network.number(name, fact)]
    values += _latent_frames(network) + _patch_size(network) + _head_dim(network)
    if network.data and network.data.get("ofs_embed_dim") is None:
        values.append(ReportedValue("ofs_embed_dim", None, network.source("ofs_embed_dim") + " left out"))
    _refuse_other_networks(network)
    if network.data:
        image = model.data.get("noised_image_input")
        default = "" if image is not None else " left out, false in SAT's code"
        values.append(ReportedValue("image_to_video", bool(image), model.source("noised_image_input") + default))
    values += _positions(network) + _lora(network)
    patch_embed = network.section("modules.patch_embed_config.params", ["text_hidden_size"])
    values += patch_embed.number("text_hidden_size", "text_width")
    return values + _text_tokens(model) + _scaling_factor(model) + _noise_schedule(model) + _dtype(path, data, problems)


def vae_values_from_yaml(path: Path, data: ForeignObject, problems: list[str]) -> list[ReportedValue]:
    """Return the values of one yaml for the facts of the VAE."""
    model = _model_section(path, data, problems)
    values = _scaling_factor(model)
    network = model.section("network_config.params", _NETWORK)
    values += network.number("time_compressed_rate", "temporal_compression")
    values += [value for value in _patch_size(network) if value.key == "patch_size_t"]
    for coder_name, channels_key, channels_fact in (
        ("encoder_config", "in_channels", "vae_in_channels"),
        ("decoder_config", "out_ch", "vae_out_channels"),
    ):
        coder = model.section(f"first_stage_config.params.{coder_name}.params", _CODER)
        width, multiples = coder.data.get("ch"), coder.data.get("ch_mult")
        if isinstance(width, int) and isinstance(multiples, list) and all(isinstance(one, int) for one in multiples):
            channels = tuple(width * multiple for multiple in multiples)
            values.append(ReportedValue("block_out_channels", channels, coder.source("ch x ch_mult")))
        values += coder.number("num_res_blocks", "layers_per_block")
        values += coder.number("z_channels", "latent_channels")
        values += coder.number(channels_key, channels_fact)
        values += coder.number("temporal_compress_times", "temporal_compression", default=4)
    return values


def _file_and_folder(path: Path) -> str:
    return "/".join(path.parts[-2:])


def _model_section(path: Path, data: ForeignObject, problems: list[str]) -> YamlSection:
    file = _file_and_folder(path)
    if "model" not in data and "network_config" in data:
        return YamlSection(file, "", data, _ENGINE, problems)
    top = YamlSection(file, "", data, _TOP, problems)
    return YamlSection(file, "model", top.data.get("model"), _ENGINE, problems)


def _latent_frames(network: YamlSection) -> list[ReportedValue]:
    """Return the latent frames as SAT counts them: 1 + (frames - 1) // rate."""
    frames, rate = network.data.get("num_frames"), network.data.get("time_compressed_rate")
    if not (isinstance(frames, int) and isinstance(rate, int) and rate > 0):
        return []
    source = f"{network.source('num_frames')} {frames} at rate {rate}"
    return [ReportedValue("latent_frames", (frames - 1) // rate + 1, source)]


def _patch_size(network: YamlSection) -> list[ReportedValue]:
    """Return the patch size. 1.0 writes one number, 1.5 [time, height, width]."""
    patch = network.data.get("patch_size")
    source = network.source("patch_size")
    if patch is None:
        return []
    if isinstance(patch, int) and not isinstance(patch, bool):
        return [ReportedValue("patch_size", patch, source), ReportedValue("patch_size_t", None, source)]
    is_list = isinstance(patch, list) and len(patch) == 3 and all(isinstance(side, int) for side in patch)
    if is_list and patch[1] == patch[2]:
        return [ReportedValue("patch_size", patch[1], source), ReportedValue("patch_size_t", patch[0], source)]
    network.problems.append(f"patch_size: {source} is {patch!r}, neither a number nor [time, side, side]")
    return []


def _head_dim(network: YamlSection) -> list[ReportedValue]:
    hidden, heads = network.data.get("hidden_size"), network.data.get("num_attention_heads")
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0):
        return []
    width = hidden / heads if hidden % heads else hidden // heads
    return [ReportedValue("head_dim", width, network.source("hidden_size / num_attention_heads"))]


def _refuse_other_networks(network: YamlSection) -> None:
    """Report settings of SAT's network that diffusers' CogVideoX does not have."""
    adaln = network.section("modules.adaln_layer_config.params", ["qk_ln"])
    for section, name, usual in (
        (network, "use_SwiGLU", False),
        (network, "use_RMSNorm", False),
        (network, "elementwise_affine", True),
        (adaln, "qk_ln", True),
    ):
        if bool(section.data.get(name, usual)) != usual:
            network.problems.append(
                f"{section.source(name)} is {section.data[name]}: diffusers has no CogVideoX like that"
            )


def _positions(network: YamlSection) -> list[ReportedValue]:
    config = network.section("modules.pos_embed_config", ["target", "params"])
    params = config.section("params", _POSITION)
    target = config.target()
    if not target:
        return []
    values = [*params.number("text_length", "text_tokens")]
    if target == "Basic3DPositionEmbeddingMixin":
        values.append(ReportedValue("position", "sincos", config.source("target")))
        values += _interpolation(network, params)
    elif target == "Rotary3DPositionEmbeddingMixin":
        learned = params.data.get("learnable_pos_embed")
        source = config.source("target") + (" with learnable_pos_embed" if learned else "")
        values.append(ReportedValue("position", "learned+rotary" if learned else "rotary", source))
        values += params.number("hidden_size_head", "head_dim")
        if params.data.get("rot_v") or params.data.get("theta", 10000) != 10000:
            network.problems.append(f"{params.path}: diffusers rotates only queries and keys, with theta 10000")
    else:
        network.problems.append(f"position: {config.source('target')} is {target}, which diffusers does not have")
    return values


def _interpolation(network: YamlSection, params: YamlSection) -> list[ReportedValue]:
    """Return the scales of the sin-cos grid. v1.0 reads them from the mixin, main from the network; SAT's default is
    1.0."""
    values: list[ReportedValue] = []
    for name in ("height_interpolation", "width_interpolation", "time_interpolation"):
        fact = "temporal_interpolation" if name == "time_interpolation" else "spatial_interpolation"
        section = network if name in network.data and name not in params.data else params
        values += section.number(name, fact, whole=False, default=1.0)
    return values


def _lora(network: YamlSection) -> list[ReportedValue]:
    config = network.section("modules.lora_config", ["target", "params"])
    if not config.data:
        return []
    params = config.section("params", _LORA)
    return [*params.number("r", "lora_rank"), *params.number("lora_alpha", "lora_alpha", whole=False, default=1)]


def _text_tokens(model: YamlSection) -> list[ReportedValue]:
    conditioner = model.section("conditioner_config.params", ["emb_models"])
    values: list[ReportedValue] = []
    embedders = conditioner.data.get("emb_models")
    for number, embedder in enumerate(embedders if isinstance(embedders, list) else []):
        path = f"{conditioner.path}.emb_models[{number}]"
        section = YamlSection(model.file, path, embedder, ["target", "params"], model.problems)
        if section.target().endswith("T5Embedder"):
            params = section.section("params", ["model_dir", "max_length"])
            values += params.number("max_length", "text_tokens")
    return values


def _scaling_factor(model: YamlSection) -> list[ReportedValue]:
    return list(model.number("scale_factor", "scaling_factor", whole=False))


def _noise_schedule(model: YamlSection) -> list[ReportedValue]:
    """Return the SNR shift. A yaml writes the schedule three times; a sampler that differs from the loss is a
    conflict."""
    values: list[ReportedValue] = []
    for place in (
        "denoiser_config.params",
        "loss_fn_config.params.sigma_sampler_config.params",
        "sampler_config.params",
    ):
        config = model.section(f"{place}.discretization_config", ["target", "params"])
        target = config.target()
        if target == "ZeroSNRDDPMDiscretization":
            values += _snr_shift(config.section("params", []))
        elif target:
            model.problems.append(
                f"snr_shift_scale: {config.source('target')} is {target}; diffusers' schedulers have no such schedule"
            )
    scaling = model.section("denoiser_config.params.scaling_config", ["target"])
    target = str(scaling.data.get("target", "VideoScaling"))
    if not target.endswith("VideoScaling"):
        model.problems.append(f"{model.source('denoiser_config')}: scaling {target} is not v-prediction")
    return values


def _snr_shift(params: YamlSection) -> list[ReportedValue]:
    for name, usual in SCHEDULE.items():
        if params.data.get(name, usual) != usual:
            params.problems.append(
                f"{params.source(name)} is {params.data[name]}; diffusers' CogVideoX schedulers have {usual}"
            )
    # SAT passes the parameters to a constructor, which fails for an unknown name.
    params.problems.extend(
        f"snr_shift_scale: {params.source(name)} is unknown to SAT"
        for name in params.data
        if name not in ("shift_scale", *SCHEDULE)
    )
    if params.data.get("shift_scale") is None:
        source = f"{params.source('shift_scale')} left out, 1.0 in SAT's code"
        return [ReportedValue("snr_shift_scale", 1.0, source)]
    return list(params.number("shift_scale", "snr_shift_scale", whole=False))


def _dtype(path: Path, data: ForeignObject, problems: list[str]) -> list[ReportedValue]:
    """Return the dtype of training from the deepspeed section. ``args.bf16`` of an inference yaml does not describe
    training."""
    deepspeed = data.get("deepspeed")
    place = f"{_file_and_folder(path)}: deepspeed"
    if not isinstance(deepspeed, Mapping):
        return []
    enabled = [
        name for name in ("bf16", "fp16") if isinstance(deepspeed.get(name), Mapping) and deepspeed[name].get("enabled")
    ]
    if len(enabled) > 1:
        problems.append(f"dtype: {place} enables bf16 and fp16")
        return []
    if enabled:
        return [ReportedValue("dtype", enabled[0], f"{place}.{enabled[0]}")]
    return [ReportedValue("dtype", "fp32", f"{place}: neither bf16 nor fp16")]
