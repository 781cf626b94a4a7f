"""What the names and shapes of SAT's tensors say of a model. No value is read.

Names are SAT's, without ``model.diffusion_model.`` (transformer) or ``first_stage_model.`` (autoencoder).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from cogflow.export.claims import Claim
from cogflow.weights.tensor_source import TensorInfo

Infos = Mapping[str, TensorInfo]

PATCH = "mixins.patch_embed.proj.weight"
TEXT = "mixins.patch_embed.text_proj.weight"
LAST = "mixins.final_layer.linear.weight"
POSITIONS = "mixins.pos_embed.pos_embedding"
ROTARY = "mixins.pos_embed.freqs_sin"
UNUSED_POSITIONS = "transformer.position_embeddings.weight"
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def transformer_claims(infos: Infos, hints: Mapping[str, Any], problems: list[str]) -> list[Claim]:
    """Claims of a SAT transformer's tensors.

    ``hints``: patch_size, patch_size_t and the latent grid where yaml, user or family give them. 1.5's patch embedding is one
    matrix over flattened patches: its width alone does not tell channels from patch.
    """
    claims = _layers(infos, problems)
    claims += _widths(infos)
    claims += _patches(infos, hints, problems)
    claims += _positions(infos, hints)
    claims += _lora(infos, problems)
    kinds = Counter(
        info.dtype for name, info in infos.items() if name.startswith("transformer.layers.") and info.dtype in DTYPES
    )
    if kinds:
        # A checkpoint may be stored wider or narrower than it was trained: the yaml knows better where there is one.
        claims.append(Claim("dtype", DTYPES[kinds.most_common(1)[0][0]], "checkpoint: dtype of its layers", firm=False))
    return claims


def patches_of_table(infos: Infos) -> int | None:
    """Rows of the rotary table (patches of one clip), which 1.0 saves."""
    return infos[ROTARY].shape[0] if ROTARY in infos and len(infos[ROTARY].shape) == 2 else None


def _layers(infos: Infos, problems: list[str]) -> list[Claim]:
    claims = []
    for prefix in (
        "transformer.layers",
        "mixins.adaln_layer.adaLN_modulations",
        "mixins.adaln_layer.query_layernorm_list",
    ):
        found = indices(infos, prefix)
        if not found:
            continue
        gaps = sorted(set(range(found[-1] + 1)) - set(found))
        if gaps:
            problems.append(f"layers: checkpoint has {prefix}.{found[-1]} but not {prefix}.{gaps[0]}")
        claims.append(Claim("layers", found[-1] + 1, f"checkpoint: {prefix}.0 to {found[-1]}"))
    return claims


def _widths(infos: Infos) -> list[Claim]:
    """Facts that are one dimension of one tensor."""
    sources = (
        ("hidden", TEXT, 0), ("hidden", PATCH, 0), ("hidden", "transformer.final_layernorm.weight", 0),
        ("text_width", TEXT, 1),
        ("head_dim", "mixins.adaln_layer.query_layernorm_list.0.weight", 0), ("head_dim", ROTARY, 1),
        ("time_embed_dim", "time_embed.2.weight", 0),
        ("ofs_embed_dim", "ofs_embed.0.weight", 1),
    )  # fmt: skip
    claims = [
        Claim(key, infos[name].shape[dim], _origin(infos[name]))
        for key, name, dim in sources
        if name in infos and dim < len(infos[name].shape)
    ]
    keys = {claim.key: claim for claim in claims}
    if "ofs_embed_dim" not in keys and "time_embed_dim" in keys:
        claims.append(Claim("ofs_embed_dim", None, "checkpoint: no ofs_embed"))
    if "hidden" in keys and "head_dim" in keys and keys["hidden"].value % keys["head_dim"].value == 0:
        heads = keys["hidden"].value // keys["head_dim"].value
        claims.append(
            Claim("heads", heads, f"checkpoint: {keys['hidden'].value} wide / {keys['head_dim'].value} a head")
        )
    return claims


def _patches(infos: Infos, hints: Mapping[str, Any], problems: list[str]) -> list[Claim]:
    if PATCH not in infos:
        return []
    embed, last = infos[PATCH], infos.get(LAST)
    if len(embed.shape) == 4:
        area, over = embed.shape[2] * embed.shape[3], f"{embed.shape[2]}x{embed.shape[3]}"
        claims = [
            Claim("in_channels", embed.shape[1], _origin(embed)),
            Claim("patch_size", embed.shape[2], _origin(embed)),
            Claim("patch_size_t", None, _origin(embed)),
        ]
    elif isinstance(hints.get("patch_size"), int) and isinstance(hints.get("patch_size_t"), int):
        claims = []
        over = f"{hints['patch_size_t']}x{hints['patch_size']}x{hints['patch_size']}"
        area = hints["patch_size_t"] * hints["patch_size"] ** 2
        claims += _divided("in_channels", embed, embed.shape[1], area, over, problems)
    else:
        if isinstance(hints.get("patch_size"), int) and "patch_size_t" in hints:
            problems.append(
                f"patch_size_t: none (yaml or model=) against patches over time ({_origin(embed)}, a matrix)"
            )
        return []
    if last is not None:
        claims += _divided("out_channels", last, last.shape[0], area, over, problems)
    channels = {claim.key: claim.value for claim in claims}
    if channels.get("out_channels"):
        doubled = channels.get("in_channels") == 2 * channels["out_channels"]
        origin = f"checkpoint: {channels.get('in_channels')} channels in, {channels['out_channels']} out"
        claims.append(Claim("image_to_video", doubled, origin))
    return claims


def _divided(key: str, info: TensorInfo, total: int, area: int, over: str, problems: list[str]) -> list[Claim]:
    if total % area:
        problems.append(f"{key}: {_origin(info)} does not divide by patches of {over}")
        return []
    return [Claim(key, total // area, f"{_origin(info)} over patches of {over}")]


def _positions(infos: Infos, hints: Mapping[str, Any]) -> list[Claim]:
    table, learned = infos.get(ROTARY), infos.get(POSITIONS)
    claims: list[Claim] = []
    if table is not None:
        kind = "learned+rotary" if learned is not None else "rotary"
        claims.append(Claim("position", kind, _origin(table) + (f" and {POSITIONS}" if learned is not None else "")))
    elif learned is not None:
        # SAT's rotary mixin leaves the transformer's own, unused table in place; the sin-cos one deletes it.
        kind = "learned+rotary" if UNUSED_POSITIONS in infos else "sincos"
        claims.append(Claim("position", kind, _origin(learned)))
    elif UNUSED_POSITIONS in infos:
        claims.append(Claim("position", "rotary", f"checkpoint: {UNUSED_POSITIONS} without {POSITIONS}"))
    if learned is not None and len(learned.shape) == 3:
        patches = table.shape[0] if table is not None else hints.get("patches")
        if isinstance(patches, int):
            claims.append(
                Claim("text_tokens", learned.shape[1] - patches, f"{_origin(learned)} less {patches} patches")
            )
    return claims


def _lora(infos: Infos, problems: list[str]) -> list[Claim]:
    """SAT's LoRA: ``matrix_A.i`` [rank, in] and ``matrix_B.i`` [out, rank] beside ``original``."""
    ranks = {
        info.shape[0] if ".matrix_A." in name else info.shape[1]
        for name, info in infos.items()
        if re.search(r"\.matrix_[AB]\.\d+$", name) and len(info.shape) == 2
    }
    if len(ranks) > 1:
        problems.append(
            f"lora_rank: matrix_A and matrix_B of the checkpoint have ranks {', '.join(map(str, sorted(ranks)))}"
        )
    return [Claim("lora_rank", rank, "checkpoint: matrix_A and matrix_B") for rank in sorted(ranks)[:1]]


def vae_claims(infos: Infos, problems: list[str]) -> list[Claim]:
    """Claims of a SAT autoencoder's tensors. Time compression leaves no trace in the shapes."""
    claims: list[Claim] = []
    for side, prefix, spare in (("encoder", "encoder.down", 0), ("decoder", "decoder.up", 1)):
        levels = indices(infos, prefix)
        widths = [_shape(infos, f"{prefix}.{level}.block.0.conv1.conv.weight") for level in levels]
        if levels and all(widths) and levels == list(range(len(levels))):
            channels = tuple(width[0] for width in widths if width)
            claims.append(Claim("block_out_channels", channels, f"checkpoint: {prefix}.0 to {levels[-1]}"))
            blocks = {len(indices(infos, f"{prefix}.{level}.block")) - spare for level in levels}
            if len(blocks) > 1:
                problems.append(
                    f"layers_per_block: levels of the {side} have {', '.join(map(str, sorted(blocks)))} blocks"
                )
            claims.append(Claim("layers_per_block", min(blocks), f"checkpoint: {prefix}.0.block.*"))
    sources = (
        ("vae_in_channels", "encoder.conv_in.conv.weight", 1, 1), ("latent_channels", "encoder.conv_out.conv.weight", 0, 2),
        ("latent_channels", "decoder.conv_in.conv.weight", 1, 1), ("vae_out_channels", "decoder.conv_out.conv.weight", 0, 1),
    )  # fmt: skip
    for key, name, dim, share in sources:
        if _shape(infos, name):
            claims.append(Claim(key, infos[name].shape[dim] // share, _origin(infos[name])))
    kinds = Counter(info.dtype for info in infos.values() if info.dtype in DTYPES)
    if kinds:
        claims.append(
            Claim("dtype", DTYPES[kinds.most_common(1)[0][0]], "checkpoint: dtype of its tensors", firm=False)
        )
    return claims


def indices(infos: Infos, prefix: str) -> list[int]:
    """The numbers i of ``prefix.i.``, sorted."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return sorted({int(match[1]) for name in infos if (match := pattern.match(name))})


def _shape(infos: Infos, name: str) -> tuple[int, ...] | None:
    return infos[name].shape if name in infos and len(infos[name].shape) == 5 else None


def _origin(info: TensorInfo) -> str:
    return f"checkpoint: {info.name} {list(info.shape)}"
