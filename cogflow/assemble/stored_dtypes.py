"""The dtype that weights are stored in against the one that the model needs. Only headers are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cogflow.assemble.components import STEMS, PipelineComponent
from cogflow.assemble.contradiction import Contradiction
from cogflow.errors import CogflowError
from cogflow.models.family import Family
from cogflow.models.loading import DTYPES
from cogflow.weights.tensor_source import WeightsFolder


def stored_dtypes(part: PipelineComponent) -> dict[str, int]:
    """fp32, bf16, fp16 or torch's name -> how many tensors are stored in it; empty where the weights cannot be read."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    counts: dict[str, int] = {}
    try:
        tensors = WeightsFolder(part.folder, STEMS[part.name]).tensors if part.files else {}
    except CogflowError:
        return {}
    for info in tensors.values():
        name = names.get(info.dtype, str(info.dtype))
        counts[name] = counts.get(name, 0) + 1
    return counts


def dtype_contradictions(parts: Mapping[str, PipelineComponent], family: Family | None) -> Iterator[Contradiction]:
    """The transformer in the other half than it was trained in; a VAE or a text encoder in fp16 beside a bf16 model.

    Wider is no contradiction, nor is a narrower one that was asked for: fp32 holds every value of both, and an export in 16 bits of
    what was trained in 32 says so itself. But bf16 weights cut to fp16 lose their range, fp16 ones in bf16 three bits of each value,
    and the VAE and T5 of the bf16 models overflow in fp16.
    """
    transformer = parts["transformer"]
    trained = (transformer.made.get("trained_with") or {}).get("dtype")
    needed = (
        trained if trained in ("fp16", "bf16") else family.dtype if family is not None and trained is None else None
    )
    if needed not in ("fp16", "bf16"):
        return
    other = "fp16" if needed == "bf16" else "bf16"
    origin = str(transformer.told_by) if trained is not None else f"the facts of {family.name}" if family else ""
    for name in STEMS:
        if name not in parts or (name != "transformer" and other != "fp16"):
            continue
        counts = stored_dtypes(parts[name])
        if other not in counts:
            continue
        again = f"stage.{name}=FOLDER of weights in {needed} or fp32"
        if name == "transformer" and transformer.made.get("source"):
            again = f"stage.transformer={transformer.made['source']} stage.dtype={needed}"
        why = "the transformer was trained in" if trained is not None else "its family was trained in"
        yield Contradiction(
            f"{name}.dtype",
            other,
            f"{counts[other]} of {sum(counts.values())} tensors in {parts[name].folder}",
            why,
            needed,
            origin,
            again,
        )
