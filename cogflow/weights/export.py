"""From a verified source to a published diffusers component, tensor by tensor, with the facts of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch

from cogflow.errors import ConfigError, QualityGateError
from cogflow.files.manifest import hash_file
from cogflow.files.publish import publish_folder, require_space, write_json
from cogflow.models.components import DTYPES, dtype_name
from cogflow.weights.fingerprint import fingerprint
from cogflow.weights.reader import WeightsFolder, listed, read_json
from cogflow.weights.source import Source
from cogflow.weights.strict import check_tensors, load_check, skeleton
from cogflow.weights.writer import TensorFacts, target_dtype, write_weights


class Bar(Protocol):
    def advance(self, n: int = 1, note: str = "") -> None: ...


def export_transformer(
    source: Source, output: Path, dtype: str, max_shard_size: str, report: Callable[[int, str], AbstractContextManager[Bar]]
) -> dict[str, Any]:
    """Publish ``output/transformer`` and ``output/export.json``; returns what export.json says.

    ``dtype``: auto, fp32, bf16 or fp16. Memory: one shard. Nothing is published when a tensor is missing, extra, of another
    shape (:class:`ConversionError`) or not finite (:class:`QualityGateError`). An earlier export at ``output`` is replaced at
    the end, in one step. ``report`` opens a progress bar of (total, description).
    """
    weights = WeightsFolder(source.folder)
    settings = read_json(source.folder / "config.json")
    names = check_tensors(weights, skeleton(settings, source.folder / "config.json"))
    target = choose_dtype(dtype, source)
    needed = sum(math.prod(info.shape) * target_dtype(info, target).itemsize for info in weights.tensors.values())
    require_space(output, needed)
    facts: list[TensorFacts] = []
    with publish_folder(output, replace=True) as partial:
        component = partial / "transformer"
        with report(len(names), "export") as bar:

            def note(fact: TensorFacts) -> None:
                facts.append(fact)
                bar.advance(note=fact.name)

            write_weights(weights, names, target, component, max_shard_size, note)
        refuse_nonfinite(facts, source.folder)
        settings = {key: value for key, value in settings.items() if key != "_name_or_path"} | {"_diffusers_version": diffusers.__version__}
        write_json(component / "config.json", settings)
        load_check(component)
        description = _describe(source, weights, component, facts)
        write_json(partial / "export.json", description)
    return description


def choose_dtype(asked: str, source: Source) -> torch.dtype | None:
    """The dtype to write. auto: the one the transformer was trained in; None (as stored) where nothing tells it."""
    name = asked
    if asked == "auto":
        trained = source.trainer.get("trained_with") or {}
        if not trained.get("dtype"):
            return None
        name = str(trained["dtype"])
    if name not in DTYPES:
        raise ConfigError(f"stage.dtype={asked}: {name} is unknown.", f"Choose auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def refuse_nonfinite(facts: list[TensorFacts], folder: Path) -> None:
    """Raise :class:`QualityGateError` naming the tensors that hold, or would hold after the cast, NaN or infinity."""
    bad = [f"{fact.name}: {fact.nonfinite} values that are not finite" for fact in facts if fact.nonfinite]
    bad += [f"{fact.name}: {fact.became_inf} values beyond {fact.dtype_out}'s range" for fact in facts if fact.became_inf]
    if bad:
        raise QualityGateError(
            f"{folder} is not exported, not every value would be finite:\n{listed(bad)}",
            "Values beyond fp16's range fit into stage.dtype=bf16; NaN in a checkpoint means that training broke before it.",
        )


def _describe(source: Source, weights: WeightsFolder, component: Path, facts: list[TensorFacts]) -> dict[str, Any]:
    written = WeightsFolder(component)
    dtypes = {info.dtype for info in written.tensors.values()}
    return {
        "source": str(source.origin.absolute()),
        "weights": source.weights,
        "step": source.step,
        "family": source.trainer.get("family"),
        "model": source.trainer.get("model"),
        "trained_with": source.trainer.get("trained_with"),
        "dtype": dtype_name(dtypes.pop()) if len(dtypes) == 1 else "mixed",
        "source_files": source.files,
        "files": {f"transformer/{path.name}": hash_file(path) for path in sorted(component.iterdir())},
        # Over names and values: which weights these are, however they are split into files.
        "source_weights_sha256": fingerprint(weights.items()),
        "weights_sha256": fingerprint(written.items()),
        "summary": {
            "tensors": len(facts),
            "parameters": sum(math.prod(fact.shape) for fact in facts),
            "changed": max(fact.changed for fact in facts),
            "became_zero": sum(fact.became_zero for fact in facts),
            "became_inf": sum(fact.became_inf for fact in facts),
        },
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "tensors": [asdict(fact) for fact in facts],
    }
