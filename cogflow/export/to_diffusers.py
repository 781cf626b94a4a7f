"""Write planned components and publish them: streamed, counted, proven, or not there at all."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from safetensors.torch import save_file

from cogflow.errors import QualityGateError, format_list
from cogflow.export import diffusers_configs
from cogflow.export.component import Component, PreparedExport, check_tables
from cogflow.export.origin import ExportOrigin
from cogflow.export.proof import prove_transformer, prove_vae
from cogflow.files.atomic_write import require_space, write_json
from cogflow.files.hashing import hash_file
from cogflow.files.publish import publish_folder
from cogflow.files.uncached_io import ReadBack
from cogflow.models.loading import dtype_name
from cogflow.weights.cast_statistics import TensorStatistics, torch_dtype_name
from cogflow.weights.strict_loading import STEMS, check_strict_load
from cogflow.weights.weights_writer import SafetensorsFormat, write_safetensors

LORA_FILE = "pytorch_lora_weights.safetensors"  # what load_lora_weights looks for in a folder
REPORT = "export.json"


class Bar(Protocol):
    def advance(self, n: int = 1, note: str = "") -> None: ...


Report = Callable[[int, str], AbstractContextManager[Bar]]


def export_diffusers(
    prepared: PreparedExport, origin: ExportOrigin, output: Path, max_shard_size: str, verify: str, report: Report
) -> dict[str, Any]:
    """Publish ``output/<component>`` in diffusers' layout, and ``output/export.json``; returns what that says.

    ``verify``: auto, whole, ends (:mod:`cogflow.export.proof`), or off: then the shards are not read back, either. ``report``
    opens a progress bar of (bytes, description). Memory: a few chunks of one tensor, and one block for the proof. An earlier
    export at ``output`` is replaced at the end, in one step. Raises :class:`QualityGateError` for values that are not finite and
    for a proof that fails; nothing is published then.
    """
    needed = written_bytes(prepared)
    require_space(output, needed)
    tables = {name: value for component in prepared.components for name, value in check_tables(component).items()}
    hashes: dict[str, str] = {}
    with publish_folder(output, replace=True, known=hashes) as partial, ReadBack() as reading:
        # What the disk really holds is looked at while the next shard is written and while the proof runs.
        closed = reading.add if verify != "off" else lambda path, sha256: None
        facts: dict[str, list[TensorStatistics]] = {}
        with report(needed, "export") as bar:
            for component in prepared.components:
                facts[component.name], written = write_component(
                    component, partial / component.name, max_shard_size, bar, closed
                )
                hashes |= {f"{component.name}/{name}": sha256 for name, sha256 in written.items()}
        refuse_nonfinite([fact for each in facts.values() for fact in each], origin.place)
        if prepared.adapters is not None:
            tensors, header = prepared.adapters
            (partial / "lora").mkdir()
            save_file(tensors, partial / "lora" / LORA_FILE, metadata=header)
        if prepared.facts is not None:
            (partial / "scheduler").mkdir()
            write_json(
                partial / "scheduler" / "scheduler_config.json", diffusers_configs.scheduler_config(prepared.facts)
            )
        proof = {
            component.name: _prove(component, partial / component.name, verify) for component in prepared.components
        }
        if left := reading.pending_bytes():
            with report(left, "read back") as bar:
                reading.finish(lambda size, name: bar.advance(size, note=name))
        else:
            reading.finish(lambda size, name: None)
        small = [str(path.relative_to(partial)) for path in sorted(partial.rglob("*")) if path.is_file()]
        files = {name: hashes.get(name) or hash_file(partial / name) for name in small}
        description = describe(prepared, origin, facts, files, proof, tables)
        write_json(partial / REPORT, description)
    return description


def write_component(
    component: Component, folder: Path, max_shard_size: str, bar: Bar, closed: Callable[[Path, str], None]
) -> tuple[list[TensorStatistics], dict[str, str]]:
    """Config and weights of one component; facts of each tensor and sha256 of each shard, which ``closed`` is told, too."""
    facts: list[TensorStatistics] = []
    outputs = component.outputs()
    sizes = {one.name: one.bytes(component.dtype) for one in outputs}

    def note(fact: TensorStatistics) -> None:
        facts.append(fact)
        bar.advance(sizes[fact.name], note=fact.name)

    hashes = write_safetensors(
        outputs, SafetensorsFormat(folder, component.dtype, STEMS[component.name], max_shard_size), note, closed
    )
    config = dict(component.config)
    if component.name == "text_encoder" and component.dtype is not None:
        config["dtype"] = torch_dtype_name(component.dtype)
    write_json(folder / "config.json", config)
    check_strict_load(folder, component.name)
    return facts, hashes


def _prove(component: Component, folder: Path, verify: str) -> dict[str, Any]:
    if verify == "off":
        return {"what": "strict load only: stage.verify=off"}
    if component.name == "vae":
        return prove_vae(folder)
    if component.name != "transformer" or component.plan is None or component.source is None:
        return {"what": "strict load; the source has the same layout"}
    computed = {
        drop.source: drop.recipe.make for drop in component.plan.drops if drop.recipe is not None and drop.recipe.exact
    }
    heads = int(component.config["num_attention_heads"])
    return prove_transformer(
        component.source, folder, heads, computed, {"auto": None, "whole": True, "ends": False}[verify]
    )


def written_bytes(prepared: PreparedExport) -> int:
    """Of all weights."""
    total = sum(output.bytes(component.dtype) for component in prepared.components for output in component.outputs())
    return total + sum(tensor.nbytes for tensor in (prepared.adapters or ({}, {}))[0].values())


def refuse_nonfinite(facts: list[TensorStatistics], place: Path) -> None:
    """Raise :class:`QualityGateError` naming the tensors that hold, or would hold after the cast, NaN or infinity."""
    bad = [f"{fact.name}: {fact.nonfinite} values that are not finite" for fact in facts if fact.nonfinite]
    bad += [
        f"{fact.name}: {fact.became_inf} values beyond {fact.dtype_out}'s range" for fact in facts if fact.became_inf
    ]
    if bad:
        raise QualityGateError(
            f"{place} is not exported, not every value would be finite:\n{format_list(bad)}",
            "Values beyond fp16's range fit into stage.dtype=bf16; NaN in a checkpoint means that training broke before it.",
        )


def describe(
    prepared: PreparedExport,
    origin: ExportOrigin,
    facts: Mapping[str, list[TensorStatistics]],
    files: Mapping[str, str],
    proof: Mapping[str, Any],
    tables: Mapping[str, float],
) -> dict[str, Any]:
    """What export.json says. The transformer's own keys stand at the top; the others' under ``components``."""
    known = prepared.facts
    first = next(iter(facts.values()))
    main = facts.get("transformer", first)
    dtypes = {fact.dtype_out for fact in main}
    return {
        "source": str(origin.place),
        "kind": origin.kind,
        "weights": origin.weights,
        "step": origin.step,
        "family": known.family if known else origin.trainer.get("family"),
        "model": origin.trainer.get("model"),
        "trained_with": known.trained_with() if known else origin.trainer.get("trained_with"),
        "facts": [{"fact": key, "value": value, "from": place} for key, value, place in known.table()] if known else [],
        "dtype": dtype_name(getattr(torch, dtypes.pop())) if len(dtypes) == 1 else "mixed",
        "source_files": dict(origin.files),
        "files": dict(files),
        # Over names and values: which weights these are, however they are split into files.
        "source_weights_sha256": fingerprint(main, before=True),
        "weights_sha256": fingerprint(main),
        "summary": summary(main),
        "lora": prepared.adapted or None,
        "ignored": prepared.ignored,
        "dropped": [
            {"source": n, "reason": reason} for component in prepared.components for n, reason in component.dropped
        ],
        "computed_tables": dict(tables),
        "proof": dict(proof),
        "norm_eps": "1e-5, as published; SAT's last norm has 1e-6, which one config for all norms cannot say"
        if known
        else None,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "tensors": [asdict(fact) for fact in main],
        "components": {
            name: {
                "summary": summary(each),
                "weights_sha256": fingerprint(each),
                "tensors": [asdict(fact) for fact in each],
            }
            for name, each in facts.items()
            if each is not main
        },
    }


def summary(facts: list[TensorStatistics]) -> dict[str, Any]:
    """Counts over all tensors, and what the cast cost at most."""
    narrow = [fact.holds_only for fact in facts if fact.holds_only]
    return {
        "tensors": len(facts),
        "parameters": sum(math.prod(fact.shape) for fact in facts),
        "operations": {
            kind: sum(fact.operation == kind for fact in facts) for kind in sorted({fact.operation for fact in facts})
        },
        "changed": max(fact.changed for fact in facts),
        "relative": max(fact.relative for fact in facts),
        "became_zero": sum(fact.became_zero for fact in facts),
        "became_subnormal": sum(fact.became_subnormal for fact in facts),
        "became_inf": sum(fact.became_inf for fact in facts),
        "holds_only": {dtype: narrow.count(dtype) for dtype in sorted(set(narrow))},
    }


def fingerprint(facts: list[TensorStatistics], before: bool = False) -> str:
    """:func:`cogflow.weights.tensor_source.weights_fingerprint` of what was written, or of the same tensors before the cast."""
    lines = [
        f"{fact.name} torch.{fact.dtype_in if before else fact.dtype_out} {tuple(fact.shape)} {fact.sha256_in if before else fact.sha256}"
        for fact in facts
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
