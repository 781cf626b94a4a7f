"""Every fact that a conversion needs, from evidence: the tensors' shapes, SAT's yaml files, what the user gives, the family.

Nothing is guessed. Shapes, yaml, ``given`` and ``model=`` must agree; what none of them settles has to be given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cogflow.errors import ConfigError, ConversionError, format_list
from cogflow.export import shape_claims, yaml_claims
from cogflow.export.claims import Claim, Fact, same, settle, shown
from cogflow.export.shape_claims import Infos
from cogflow.models.family import MODEL_SPECS, ModelSpec

Yamls = Sequence[tuple[Path, Mapping[str, Any]]]

KINDS: dict[str, Any] = {
    "layers": int, "heads": int, "head_dim": int, "hidden": int, "in_channels": int, "out_channels": int, "patch_size": int,
    "patch_size_t": int, "text_width": int, "time_embed_dim": int, "ofs_embed_dim": int, "position": str, "latent_height": int,
    "latent_width": int, "latent_frames": int, "temporal_compression": int, "text_tokens": int, "scaling_factor": float,
    "snr_shift_scale": float, "spatial_interpolation": float, "temporal_interpolation": float, "invert_scale_latents": bool,
    "dtype": str, "lora_rank": int, "lora_alpha": float,
}  # fmt: skip
"""Facts that a user can give (``stage.facts.<key>``) and their kind."""
NULLABLE = ("patch_size_t", "ofs_embed_dim")
CHOICES = {"position": ("rotary", "sincos", "learned+rotary"), "dtype": ("fp32", "bf16", "fp16")}
SCHEDULER = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
"""What every CogVideoX has: SAT's VideoScaling, its sampler's steps, ZeroSNRDDPMDiscretization. Other yamls are refused."""

_OPTIONAL = ("spatial_interpolation", "temporal_interpolation", "lora_rank", "lora_alpha")
TRANSFORMER = tuple(key for key in KINDS if key not in _OPTIONAL)
VAE = (
    "block_out_channels", "layers_per_block", "latent_channels", "vae_in_channels", "vae_out_channels", "temporal_compression",
    "scaling_factor", "invert_scale_latents", "dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """Settled facts by key. ``family``: the member that was asked for, or the one that agrees in every trait, or ``None``."""

    values: Mapping[str, Fact]
    family: str | None

    def __getitem__(self, key: str) -> Any:
        return self.values[key].value

    def get(self, key: str, default: Any = None) -> Any:
        return self.values[key].value if key in self.values else default

    @property
    def image_to_video(self) -> bool:
        return bool(self["in_channels"] != self["out_channels"])

    def table(self) -> list[tuple[str, str, str]]:
        """(fact, value, where from), for the summary and ``stage.dry_run``."""
        return [(key, shown(fact.value), fact.origin) for key, fact in self.values.items()]

    def trained_with(self) -> dict[str, Any]:
        """``trained_with`` of export.json, with the keys that training writes."""
        keys = ("scaling_factor", "invert_scale_latents", "snr_shift_scale", "dtype")
        return {key: self[key] for key in keys} | SCHEDULER | {"max_sequence_length": self["text_tokens"]}


def read_yamls(paths: Iterable[Path]) -> list[tuple[Path, Mapping[str, Any]]]:
    """(path, content) of yaml files, for :func:`gather`. Raises :class:`ConfigError` for one that is no mapping or cannot be read."""
    found: list[tuple[Path, Mapping[str, Any]]] = []
    for path in paths:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read as yaml: {error}", "Mend it, or move it away.") from error
        if not isinstance(content, dict):
            raise ConfigError(
                f"{path} holds no mapping.", "SAT's yaml files have model:, args:, data: or deepspeed: at their top."
            )
        found.append((Path(path), content))
    return found


def gather(infos: Infos, yamls: Yamls, family: str = "auto", given: Mapping[str, Any] | None = None) -> Facts:
    """The facts of a SAT transformer.

    ``infos``: its tensors, without ``model.diffusion_model.``. ``yamls``: (path, content) of each yaml found. ``family``: auto
    or a key of MODEL_SPECS. ``given``: the user's own facts; null counts as not given. Raises :class:`ConversionError` listing
    every contradiction with both values and both sources, :class:`ConfigError` listing what is unsettled and how to give it.
    """
    if not any(name.startswith("transformer.layers.") for name in infos):
        raise ConversionError(
            f"These tensors are no SAT transformer: none of {len(infos)} is of transformer.layers.",
            "First names: "
            + (", ".join(list(infos)[:5]) or "none")
            + ". Expected: transformer.layers.0.attention.query_key_value.weight",
        )
    problems: list[str] = []
    member = _member(family)
    others = [claim for path, data in yamls for claim in yaml_claims.transformer_claims(path, data, problems)]
    others += _given(given or {}) + _family_claims(member)
    first, _ = settle(others)
    hints = {key: fact.value for key, fact in first.items()}
    hints["patches"] = _patches(hints)
    shapes = shape_claims.transformer_claims(infos, hints, problems)
    values, contradictions = settle([*shapes, *others])
    _convention(values)
    problems += contradictions + _grid(infos, values) + _halves(shapes, values)
    needed = list(TRANSFORMER)
    if values.get("position") and values["position"].value == "sincos":
        needed += ["spatial_interpolation", "temporal_interpolation"]
    if "lora_rank" in values and any(".matrix_A." in name for name in infos):
        needed.append("lora_alpha")
    _refuse(problems, [key for key in needed if key not in values], family)
    order = {key: number for number, key in enumerate(KINDS)}
    kept = {key: values[key] for key in sorted(values, key=lambda key: order.get(key, len(order))) if key in KINDS}
    return Facts(kept, member.name if member else _named(kept))


def gather_vae(infos: Infos, yamls: Yamls, family: str = "auto", given: Mapping[str, Any] | None = None) -> Facts:
    """The facts of a SAT autoencoder (``encoder.*``, ``decoder.*``); errors as :func:`gather`'s.

    Shapes do not tell 1.0 from 1.5 nor the scaling factor, so a bare ``3d-vae.pt`` needs a yaml, ``family`` or ``given``.
    """
    if not any(name.startswith(("encoder.down.", "decoder.up.")) for name in infos):
        raise ConversionError(
            f"These tensors are no SAT autoencoder: none of {len(infos)} is of encoder.down. or decoder.up.",
            "First names: " + (", ".join(list(infos)[:5]) or "none"),
        )
    problems: list[str] = []
    member = _member(family)
    claims = shape_claims.vae_claims(infos, problems)
    claims += [claim for path, data in yamls for claim in yaml_claims.vae_claims(path, data, problems)]
    claims += _given(given or {}) + _family_claims(member)
    values, contradictions = settle(claims)
    if "patch_size_t" in values:
        _convention(values)
    relevant = (*VAE, "patch_size_t")
    problems += [line for line in contradictions if line.partition(":")[0] in relevant]
    _refuse(problems, [key for key in VAE if key not in values], family)
    return Facts({key: values[key] for key in VAE}, member.name if member else None)


def of_family(name: str) -> Facts:
    """The facts of a member at its published size, from the family table alone: for weights whose names say nothing of SAT."""
    member = _member(name)
    if member is None:
        raise ConfigError("model=auto is no member of the family.", f"Choose one of {', '.join(MODEL_SPECS)}.")
    values, _ = settle(_family_claims(member))
    origin = f"model={name}"
    values["hidden"] = Fact(member.heads * member.head_dim, origin)
    values["time_embed_dim"] = Fact(
        64 if name == "tiny" else 512, origin
    )  # 512 in every yaml of SAT; tiny's in models/tiny.py
    return Facts({key: values[key] for key in KINDS if key in values}, name)


def _member(family: str) -> ModelSpec | None:
    if family == "auto":
        return None
    if family not in MODEL_SPECS:
        raise ConfigError(f"model={family} is unknown.", f"Choose auto or {', '.join(MODEL_SPECS)}.")
    return MODEL_SPECS[family]


def position(member: ModelSpec) -> str:
    return "sincos" if not member.rotary else "learned+rotary" if member.learned_positions else "rotary"


def _family_claims(member: ModelSpec | None) -> list[Claim]:
    """Traits must agree; sizes and the dtype, which finetuning may change, only fill gaps."""
    if member is None:
        return []
    origin = f"model={member.name}"
    traits = {key: getattr(member, key) for key in _TRAITS} | {
        "position": position(member),
        "out_channels": member.latent_channels,
    }
    sizes = {
        "latent_height": member.height // 8, "latent_width": member.width // 8, "latent_frames": (member.frames - 1) // 4 + 1,
        "temporal_compression": 4, "dtype": member.dtype,
    }  # fmt: skip
    if not member.rotary:
        sizes |= {"spatial_interpolation": 1.875, "temporal_interpolation": 1.0}  # sat/configs/cogvideox_2b.yaml
    return [Claim(key, value, origin) for key, value in traits.items()] + [
        Claim(key, value, origin, firm=False) for key, value in sizes.items()
    ]


_TRAITS = (
    "layers", "heads", "head_dim", "in_channels", "patch_size", "patch_size_t", "ofs_embed_dim", "text_tokens", "text_width",
    "scaling_factor", "snr_shift_scale", "invert_scale_latents", "latent_channels",
)  # fmt: skip
_NAMING = (
    "layers",
    "heads",
    "head_dim",
    "in_channels",
    "patch_size",
    "patch_size_t",
    "ofs_embed_dim",
    "text_width",
    "snr_shift_scale",
)


def _named(values: Mapping[str, Fact]) -> str | None:
    """The one member with the same architecture and schedule. The table names the result and decides nothing."""
    matches = [
        member.name
        for member in MODEL_SPECS.values()
        if all(same(values[key].value, getattr(member, key)) for key in _NAMING)
        and values["position"].value == position(member)
    ]
    return matches[0] if len(matches) == 1 else None


def _given(given: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for key, raw in given.items():
        if key not in KINDS:
            raise ConfigError(f"stage.facts.{key} is unknown.", f"Facts that can be given: {', '.join(KINDS)}.")
        if raw is None:
            continue
        value, kind = (None if key in NULLABLE and raw == "none" else raw), KINDS[key]
        right = isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if (value is not None and not right) or (key in CHOICES and value not in CHOICES[key]):
            names = {int: "a whole number", float: "a number", bool: "true or false"}
            raise ConfigError(
                f"stage.facts.{key}={raw} is not {names.get(kind) or 'one of ' + ', '.join(CHOICES[key])}."
            )
        claims.append(Claim(key, value, f"stage.facts.{key}"))
    return claims


def _convention(values: dict[str, Fact]) -> None:
    """``invert_scale_latents`` is a word of diffusers; neither SAT's weights nor its yamls have it.

    The published 1.5 pipelines have it true and the 1.0 ones false, and only image to video reads it. SAT's own 1.5 code feeds
    image latents times the scaling factor in training and undivided in sampling, so ``given`` can say otherwise.
    """
    if "patch_size_t" in values and "invert_scale_latents" not in values:
        newer = values["patch_size_t"].value is not None
        origin = f"diffusers' {'1.5' if newer else '1.0'} models, by patch_size_t ({values['patch_size_t'].origin})"
        values["invert_scale_latents"] = Fact(newer, origin)


def _patches(values: Mapping[str, Any]) -> int | None:
    """Patches of one clip of 1.0: latent frames x rows x columns."""
    sizes = [values.get(key) for key in ("latent_frames", "latent_height", "latent_width", "patch_size")]
    if values.get("patch_size_t") is not None or not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    frames, height, width, patch = (int(size) for size in sizes if size is not None)
    return frames * (height // patch) * (width // patch)


def _grid(infos: Infos, values: Mapping[str, Fact]) -> list[str]:
    """1.0 saves its tables, so that their length must be that of the grid."""
    rows, expected = shape_claims.patches_of_table(infos), _patches({key: fact.value for key, fact in values.items()})
    if rows is None or expected is None or rows == expected:
        return []
    keys = ("latent_frames", "latent_height", "latent_width")
    sizes = ", ".join(f"{key} {values[key].value} ({values[key].origin})" for key in keys)
    return [f"latent grid: {expected} patches by {sizes} against {rows} rows of {shape_claims.ROTARY} (checkpoint)"]


def _halves(shapes: Sequence[Claim], values: Mapping[str, Fact]) -> list[str]:
    """A checkpoint may be stored wider than it was trained, but bf16 training never writes fp16, nor the other way round."""
    stored = next((claim for claim in shapes if claim.key == "dtype"), None)
    if (
        stored is None
        or {stored.value, values["dtype"].value} != {"bf16", "fp16"}
        or values["dtype"].origin.startswith("model=")
    ):
        return []
    return [f"dtype: {stored.value} ({stored.origin}) against {values['dtype'].value} ({values['dtype'].origin})"]


def _refuse(problems: list[str], missing: list[str], family: str) -> None:
    lines = list(dict.fromkeys(problems))
    if lines:
        besides = f"\nUnsettled besides: {', '.join(missing)}." if missing else ""
        raise ConversionError(
            f"The evidence contradicts itself:\n{format_list(lines)}{besides}",
            "Mend or remove the yaml that is wrong, or choose another model= or stage.facts.",
        )
    if missing:
        whole = (
            ""
            if family != "auto"
            else f", or model= one of {', '.join(name for name in MODEL_SPECS if name != 'tiny')}"
        )
        names = [f"stage.facts.{key}" if key in KINDS else key for key in missing]
        raise ConfigError(
            f"Neither the checkpoint's shapes nor a yaml of SAT settles: {', '.join(missing)}.",
            f"Put the yaml it was trained with beside it{whole}, or give {' '.join(f'{name}=...' for name in names)}",
        )
