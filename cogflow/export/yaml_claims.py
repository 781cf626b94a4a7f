"""What SAT's yaml files say of a model: the per-model yaml and the merged ``training_config.yaml`` of a run.

Both hold the same ``model`` section; the merged one adds ``args``, ``data`` and ``deepspeed``. A key that a yaml leaves out has
the default of SAT's code, which is evidence too and is called so. Two are not taken over: ``scale_factor`` (SAT would run
with 1.0, which no CogVideoX has) and the text encoder's ``max_length``.
Source: zai-org/CogVideo, ``sat/`` at v1.0 and main: diffusion_video.py, dit_video_concat.py, discretizer.py, lora2.py of SAT.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cogflow.export.claims import Claim
from cogflow.weights.foreign import SIZES

SCHEDULE = {
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "num_timesteps": 1000,
    "keep_start": False,
    "post_shift": False,
}
"""Parameters of SAT's noise schedule that diffusers' schedulers have no word for; other values are refused."""

_NETWORK = [
    "transformer_args", "num_frames", "time_compressed_rate", "latent_width", "latent_height", "patch_size", "in_channels",
    "out_channels", "hidden_size", "num_layers", "num_attention_heads", "elementwise_affine", "time_embed_dim", "num_classes",
    "modules", "input_time", "adm_in_channels", "parallel_output", "height_interpolation", "width_interpolation", "time_interpolation",
    "use_SwiGLU", "use_RMSNorm", "zero_init_y_embed", "ofs_embed_dim", "dtype",
]  # fmt: skip
_SIZES = (("num_layers", "layers"), ("num_attention_heads", "heads"), ("hidden_size", "hidden"))
_POSITIONS = [
    "hidden_size_head", "text_length", "theta", "rot_v", "learnable_pos_embed", "height_interpolation", "width_interpolation",
    "time_interpolation",
]  # fmt: skip
_ENGINE = [
    "scale_factor", "disable_first_stage_autocast", "latent_input", "noised_image_input", "noised_image_all_concat",
    "noised_image_dropout", "augmentation_dropout", "log_keys", "denoiser_config", "network_config", "conditioner_config",
    "first_stage_config", "loss_fn_config", "sampler_config",
]  # fmt: skip
_CODER = [
    "double_z", "z_channels", "resolution", "in_channels", "out_ch", "ch", "ch_mult", "attn_resolutions", "num_res_blocks", "dropout",
    "gather_norm", "temporal_compress_times", "resamp_with_conv", "pad_mode",
]  # fmt: skip


class Section:
    """One mapping of a yaml, which knows its place and the names that SAT reads there."""

    def __init__(self, file: str, path: str, data: Any, known: list[str], problems: list[str]) -> None:
        self.file, self.path, self.problems = file, path, problems
        if data is not None and not isinstance(data, Mapping):
            problems.append(f"{file}: {path} is {type(data).__name__}, not a mapping")
        self.data: Mapping[str, Any] = data if isinstance(data, Mapping) else {}
        for name in self.data:
            close = difflib.get_close_matches(str(name), known, 1, 0.85) if name not in known else []
            if close and close[0] not in self.data:
                problems.append(f"{file}: {path}.{name} is unknown to SAT; {close[0]} is meant?")

    def below(self, name: str, known: list[str]) -> Section:
        """The mapping ``name``, or an empty one; ``a.b`` goes down twice."""
        data: Any = self.data
        for part in name.split("."):
            data = data.get(part) if isinstance(data, Mapping) else None
        return Section(self.file, f"{self.path}.{name}", data, known, self.problems)

    def origin(self, key: str) -> str:
        return f"{self.file}: {self.path}.{key}" if self.path else f"{self.file}: {key}"

    def number(self, name: str, key: str, whole: bool = True, default: float | None = None) -> Iterator[Claim]:
        """A claim of fact ``key`` from this section's ``name``; with a ``default`` also where the yaml leaves it out."""
        value = self.data.get(name)
        if value is None:
            if default is not None and self.data:
                yield Claim(key, default, f"{self.origin(name)} left out, {default} in SAT's code")
        elif isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            self.problems.append(f"{key}: {self.origin(name)} is {value!r}, not {'a whole' if whole else 'a'} number")
        else:
            yield Claim(key, value, self.origin(name))


def transformer_claims(path: Path, data: Mapping[str, Any], problems: list[str]) -> list[Claim]:
    """Claims of one yaml about the transformer and what it was trained with. ``problems`` gains what cannot be read or converted.

    SAT's own ``model_config.json`` is taken, too; it tells sizes alone.
    """
    if path.name == SIZES:
        section = Section(path_end(path), "", data, list(data), problems)
        return [claim for name, key in _SIZES for claim in section.number(name, key)]
    model = _model(path, data, problems)
    network = model.below("network_config.params", _NETWORK)
    claims: list[Claim] = []
    for name, key in (
        *_SIZES, ("in_channels", "in_channels"),
        ("out_channels", "out_channels"), ("time_embed_dim", "time_embed_dim"), ("ofs_embed_dim", "ofs_embed_dim"),
        ("latent_height", "latent_height"), ("latent_width", "latent_width"), ("time_compressed_rate", "temporal_compression"),
    ):  # fmt: skip
        claims += network.number(name, key)
    claims += _frames(network) + _patch(network)
    hidden, heads = network.data.get("hidden_size"), network.data.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        each = hidden / heads if hidden % heads else hidden // heads
        claims.append(Claim("head_dim", each, network.origin("hidden_size / num_attention_heads")))
    if network.data and network.data.get("ofs_embed_dim") is None:
        claims.append(Claim("ofs_embed_dim", None, network.origin("ofs_embed_dim") + " left out"))
    adaln = network.below("modules.adaln_layer_config.params", ["qk_ln"])
    for section, name, usual in (
        (network, "use_SwiGLU", False), (network, "use_RMSNorm", False), (network, "elementwise_affine", True), (adaln, "qk_ln", True),
    ):  # fmt: skip
        if bool(section.data.get(name, usual)) != usual:
            problems.append(f"{section.origin(name)} is {section.data[name]}: diffusers has no CogVideoX like that")
    if network.data:
        image = model.data.get("noised_image_input")
        origin = model.origin("noised_image_input") + ("" if image is not None else " left out, false in SAT's code")
        claims.append(Claim("image_to_video", bool(image), origin))
    claims += _positions(network) + _lora(network)
    claims += network.below("modules.patch_embed_config.params", ["text_hidden_size"]).number(
        "text_hidden_size", "text_width"
    )
    return claims + _text(model) + scaling(model) + _schedule(model) + _dtype(path, data, problems)


def vae_claims(path: Path, data: Mapping[str, Any], problems: list[str]) -> list[Claim]:
    """Claims of one yaml about the autoencoder."""
    model = _model(path, data, problems)
    claims = scaling(model)
    network = model.below("network_config.params", _NETWORK)
    claims += network.number("time_compressed_rate", "temporal_compression")
    claims += [claim for claim in _patch(network) if claim.key == "patch_size_t"]
    for side, ends in (("encoder_config", "vae_in_channels"), ("decoder_config", "vae_out_channels")):
        coder = model.below(f"first_stage_config.params.{side}.params", _CODER)
        width, steps = coder.data.get("ch"), coder.data.get("ch_mult")
        if isinstance(width, int) and isinstance(steps, list) and all(isinstance(step, int) for step in steps):
            claims.append(
                Claim("block_out_channels", tuple(width * step for step in steps), coder.origin("ch x ch_mult"))
            )
        claims += coder.number("num_res_blocks", "layers_per_block")
        claims += coder.number("z_channels", "latent_channels")
        claims += coder.number("in_channels" if ends == "vae_in_channels" else "out_ch", ends)
        claims += coder.number("temporal_compress_times", "temporal_compression", default=4)
    return claims


def scaling(model: Section) -> list[Claim]:
    return list(model.number("scale_factor", "scaling_factor", whole=False))


def path_end(path: Path) -> str:
    """A file and its folder, for messages."""
    return "/".join(path.parts[-2:])


def _model(path: Path, data: Mapping[str, Any], problems: list[str]) -> Section:
    file = path_end(path)
    if "model" not in data and "network_config" in data:
        return Section(file, "", data, _ENGINE, problems)
    top = Section(file, "", data, ["model", "args", "data", "deepspeed"], problems)
    return Section(file, "model", top.data.get("model"), _ENGINE, problems)


def _frames(network: Section) -> list[Claim]:
    """Latent frames as SAT counts them: 1 + (frames - 1) // rate."""
    frames, rate = network.data.get("num_frames"), network.data.get("time_compressed_rate")
    if not (isinstance(frames, int) and isinstance(rate, int) and rate > 0):
        return []
    return [Claim("latent_frames", (frames - 1) // rate + 1, f"{network.origin('num_frames')} {frames} at rate {rate}")]


def _patch(network: Section) -> list[Claim]:
    """1.0 writes one number, 1.5 [time, height, width]."""
    patch, origin = network.data.get("patch_size"), network.origin("patch_size")
    if patch is None:
        return []
    if isinstance(patch, int) and not isinstance(patch, bool):
        return [Claim("patch_size", patch, origin), Claim("patch_size_t", None, origin)]
    if (
        isinstance(patch, list)
        and len(patch) == 3
        and all(isinstance(side, int) for side in patch)
        and patch[1] == patch[2]
    ):
        return [Claim("patch_size", patch[1], origin), Claim("patch_size_t", patch[0], origin)]
    network.problems.append(f"patch_size: {origin} is {patch!r}, neither a number nor [time, side, side]")
    return []


def _positions(network: Section) -> list[Claim]:
    config = network.below("modules.pos_embed_config", ["target", "params"])
    params = config.below("params", _POSITIONS)
    target = str(config.data.get("target", "")).rpartition(".")[2]
    if not target:
        return []
    claims = [*params.number("text_length", "text_tokens")]
    if target == "Basic3DPositionEmbeddingMixin":
        claims.append(Claim("position", "sincos", config.origin("target")))
        claims += _interpolation(network, params)
    elif target == "Rotary3DPositionEmbeddingMixin":
        learned = params.data.get("learnable_pos_embed")
        origin = config.origin("target") + (" with learnable_pos_embed" if learned else "")
        claims.append(Claim("position", "learned+rotary" if learned else "rotary", origin))
        claims += params.number("hidden_size_head", "head_dim")
        if params.data.get("rot_v") or params.data.get("theta", 10000) != 10000:
            network.problems.append(f"{params.path}: diffusers rotates queries and keys alone, with theta 10000")
    else:
        network.problems.append(f"position: {config.origin('target')} is {target}, which diffusers has nothing like")
    return claims


def _interpolation(network: Section, params: Section) -> list[Claim]:
    """v1.0 reads the scales of the sin-cos grid from the mixin, main from the network; 1.0 where they are left out."""
    claims: list[Claim] = []
    for name in ("height_interpolation", "width_interpolation", "time_interpolation"):
        key = "temporal_interpolation" if name == "time_interpolation" else "spatial_interpolation"
        section = network if name in network.data and name not in params.data else params
        claims += section.number(name, key, whole=False, default=1.0)
    return claims


def _lora(network: Section) -> list[Claim]:
    config = network.below("modules.lora_config", ["target", "params"])
    if not config.data:
        return []
    params = config.below(
        "params", ["r", "lora_alpha", "lora_dropout", "layer_range", "layer_num", "qlora", "cross_layer_range"]
    )
    return [*params.number("r", "lora_rank"), *params.number("lora_alpha", "lora_alpha", whole=False, default=1)]


def _text(model: Section) -> list[Claim]:
    models = model.below("conditioner_config.params", ["emb_models"])
    claims: list[Claim] = []
    embedders = models.data.get("emb_models")
    for number, embedder in enumerate(embedders if isinstance(embedders, list) else []):
        section = Section(
            model.file, f"{models.path}.emb_models[{number}]", embedder, ["target", "params"], model.problems
        )
        if str(section.data.get("target", "")).endswith("T5Embedder"):
            claims += section.below("params", ["model_dir", "max_length"]).number("max_length", "text_tokens")
    return claims


def _schedule(model: Section) -> list[Claim]:
    """The noise schedule is written three times; a sampler that differs from the loss is a contradiction."""
    claims: list[Claim] = []
    for place in (
        "denoiser_config.params",
        "loss_fn_config.params.sigma_sampler_config.params",
        "sampler_config.params",
    ):
        config = model.below(f"{place}.discretization_config", ["target", "params"])
        target = str(config.data.get("target", "")).rpartition(".")[2]
        if not target:
            continue
        if target != "ZeroSNRDDPMDiscretization":
            model.problems.append(
                f"snr_shift_scale: {config.origin('target')} is {target}; diffusers' schedulers have no such schedule"
            )
            continue
        params = config.below("params", [])
        for name, usual in SCHEDULE.items():
            if params.data.get(name, usual) != usual:
                model.problems.append(
                    f"{params.origin(name)} is {params.data[name]}; diffusers' CogVideoX schedulers have {usual}"
                )
        # SAT passes the parameters on to a constructor: it would not have run with a name that is not its own.
        for name in params.data:
            if name not in ("shift_scale", *SCHEDULE):
                model.problems.append(f"snr_shift_scale: {params.origin(name)} is unknown to SAT")
        if params.data.get("shift_scale") is None:
            claims.append(Claim("snr_shift_scale", 1.0, f"{params.origin('shift_scale')} left out, 1.0 in SAT's code"))
        else:
            claims += params.number("shift_scale", "snr_shift_scale", whole=False)
    target = str(model.below("denoiser_config.params.scaling_config", ["target"]).data.get("target", "VideoScaling"))
    if not target.endswith("VideoScaling"):
        model.problems.append(f"{model.origin('denoiser_config')}: scaling {target} is not v-prediction")
    return claims


def _dtype(path: Path, data: Mapping[str, Any], problems: list[str]) -> list[Claim]:
    """Training's precision, from the deepspeed section. ``args.bf16`` of an inference yaml tells nothing of training."""
    speed, where = data.get("deepspeed"), path_end(path) + ": deepspeed"
    if not isinstance(speed, Mapping):
        return []
    enabled = [name for name in ("bf16", "fp16") if isinstance(speed.get(name), Mapping) and speed[name].get("enabled")]
    if len(enabled) > 1:
        problems.append(f"dtype: {where} enables bf16 and fp16")
        return []
    return [
        Claim(
            "dtype",
            enabled[0] if enabled else "fp32",
            where + (f".{enabled[0]}" if enabled else ": neither bf16 nor fp16"),
        )
    ]
