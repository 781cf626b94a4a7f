"""How a pipeline is sampled so that it gives what it was trained to give: for its model card, and for who measures it."""

from __future__ import annotations

from typing import Any

from cogflow.assemble.components import PipelineComponent
from cogflow.assemble.consistency import family_of
from cogflow.assemble.verification import Reference
from cogflow.config.schema import AnyConfig

PUBLISHED = {"steps": 50, "guidance_scale": 6.0, "use_dynamic_cfg": True}
"""As the family's model cards sample."""


def how_to_sample(config: AnyConfig, reference: Reference | None, transformer: PipelineComponent) -> dict[str, Any]:
    """height, width, frames, fps, steps, guidance_scale, use_dynamic_cfg, dtype, max_sequence_length, and ``from``: who says so.

    As the run's samples were made; else at the family's native size as it was published; else as this config says.
    """
    length = transformer.settings.get("max_text_seq_length")
    if reference is not None:
        record = reference.record
        facts = {key: record[key] for key in ("height", "width", "frames", "fps", "dtype", "max_sequence_length")}
        return {**facts, **record["sampling"], "text": record["samples"][0]["text"], "from": str(reference.folder)}
    family = family_of(transformer)
    trained = transformer.made.get("trained_with") or {}
    if family is not None:
        size: dict[str, Any] = {
            "height": family.height,
            "width": family.width,
            "frames": family.frames,
            "fps": family.fps,
        }
        dtype = trained.get("dtype") or family.dtype
        return {
            **size,
            **PUBLISHED,
            "dtype": dtype,
            "max_sequence_length": length,
            "from": f"the facts of {family.name}",
        }
    data, sampling = config.data, config.sampling
    how = {
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "use_dynamic_cfg": sampling.use_dynamic_cfg,
    }
    size = {"height": data.height, "width": data.width, "frames": data.frames, "fps": data.fps}
    return {
        **size,
        **how,
        "dtype": trained.get("dtype") or config.model.dtype,
        "max_sequence_length": length,
        "from": "this command",
    }
