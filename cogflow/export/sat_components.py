"""A SAT checkpoint holds the whole engine: which of its tensors belong to which component."""

from __future__ import annotations

from dataclasses import dataclass, field

from cogflow.weights.tensor_source import RenamedTensors, TensorSource

TRANSFORMER = "model.diffusion_model."
VAE = "first_stage_model."
_ENGINE = {"transformer": TRANSFORMER, "vae": VAE}
_BARE = {
    "transformer": (
        "mixins.", "transformer.layers.", "transformer.final_layernorm.", "transformer.position_embeddings.", "time_embed.", "ofs_embed."
    ),
    "vae": ("encoder.", "decoder.", "loss."),
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Each component's tensors under its own names, ``None`` where there are none; ``other``: names that belong to no component."""

    transformer: RenamedTensors | None = None
    text_encoder: RenamedTensors | None = None
    vae: RenamedTensors | None = None
    other: list[str] = field(default_factory=list)


def text_encoder_prefix(index: int = 0) -> str:
    return f"conditioner.embedders.{index}.transformer."


def split(tensors: TensorSource) -> Parts:
    """Deal a checkpoint's tensors to the components by the engine's prefixes.

    Files that hold one component alone have no prefix (``3d-vae.pt``; a stripped transformer): they are known by their first words.
    """
    names: dict[str, dict[str, str]] = {"transformer": {}, "text_encoder": {}, "vae": {}}
    other = []
    engine = any(name.startswith((TRANSFORMER, VAE, "conditioner.")) for name in tensors.tensors)
    for name in tensors.tensors:
        component, inner = _engine(name) if engine else _bare(name)
        if component is None:
            other.append(name)
        else:
            names[component][inner] = name
    made = {component: RenamedTensors(tensors, mapping) if mapping else None for component, mapping in names.items()}
    return Parts(**made, other=other)


def _engine(name: str) -> tuple[str | None, str]:
    for component, prefix in _ENGINE.items():
        if name.startswith(prefix):
            return component, name.removeprefix(prefix)
    prefix = text_encoder_prefix()
    return ("text_encoder", name.removeprefix(prefix)) if name.startswith(prefix) else (None, name)


def _bare(name: str) -> tuple[str | None, str]:
    for component, beginnings in _BARE.items():
        if name.startswith(beginnings):
            return component, name
    return None, name
