"""Write prepared components in diffusers' layout and publish them: streamed, measured and checked, or not published
at all.

The second half builds export.json, for SAT's layout, too: where the weights are from, what each tensor is made of, and
what the cast changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import diffusers
import torch

from cogflow.errors import QualityGateError, format_list
from cogflow.export import diffusers_configs
from cogflow.export.export_plan import ExportComponent, PreparedExport, check_computed_tables
from cogflow.export.origin import ExportOrigin
from cogflow.export.output_comparison import check_component
from cogflow.files.atomic_write import require_space, write_json
from cogflow.files.hashing import hash_file
from cogflow.files.publish import publish_folder
from cogflow.files.record_io import write_record
from cogflow.files.uncached_io import ReadBack
from cogflow.models.loading import dtype_name
from cogflow.records.export_records import (
    CastSummary,
    ComponentWeights,
    DroppedTensor,
    ExportRecord,
    FactRow,
    ProofRecord,
    TensorStatistics,
)
from cogflow.runtime.progress import Advancing, progress
from cogflow.weights.strict_loading import STEMS, check_strict_load
from cogflow.weights.tensor_source import fingerprint_line, join_fingerprint
from cogflow.weights.weights_writer import PlannedTensor, SafetensorsFormat, torch_dtype_name, write_safetensors

LORA_STEM = "pytorch_lora_weights"
"""Name without suffix of the file that ``load_lora_weights`` of diffusers reads in a folder."""


def export_diffusers(
    prepared: PreparedExport, origin: ExportOrigin, output: Path, max_shard_size: str = "5GB", verify: str = "auto"
) -> ExportRecord:
    """Publish ``output/<component>`` in diffusers' layout and ``output/export.json``. Returns the content of
    export.json.

    ``verify``: see :func:`cogflow.export.output_comparison.check_component`; with off, shards are not read back from
    the disk, either. Memory: a few chunks of one tensor, and one block for the check. An earlier export at ``output``
    is replaced in one step at the end. Raises :class:`QualityGateError` for values that are not finite and for a
    failed check; then nothing is published.
    """
    total = prepared.written_bytes()
    require_space(output, total)
    tables = {name: value for one in prepared.components for name, value in check_computed_tables(one).items()}
    hashes: dict[str, str] = {}
    statistics: dict[str, list[TensorStatistics]] = {}
    with publish_folder(output, replace=True, known=hashes) as partial, ReadBack() as read_back:
        # Each shard is read back from the disk while the next one is written and while outputs are compared.
        on_file = read_back.add if verify != "off" else _ignore_file
        with progress(total, "export", unit="bytes") as bar:
            for component in prepared.components:
                writer = _ComponentWriter(component, partial / component.name, max_shard_size)
                statistics[component.name], written = writer.write(bar, on_file)
                hashes |= {f"{component.name}/{name}": sha256 for name, sha256 in written.items()}
        refuse_nonfinite(str(origin.place), statistics)
        _write_lora_and_scheduler(prepared, partial)
        proof = {one.name: check_component(one, partial / one.name, verify) for one in prepared.components}
        _finish_read_back(read_back)
        names = [str(path.relative_to(partial)) for path in sorted(partial.rglob("*")) if path.is_file()]
        files = {name: hashes.get(name) or hash_file(partial / name) for name in names}
        record = export_record(prepared, origin, WrittenExport(statistics, files, proof, tables))
        write_record(partial / ExportRecord.file_name, record)
    return record


def _ignore_file(path: Path, sha256: str) -> None:
    pass


@dataclass(frozen=True)
class _ComponentWriter:
    component: ExportComponent
    folder: Path
    max_shard_size: str

    def write(
        self, bar: Advancing, on_file: Callable[[Path, str], None]
    ) -> tuple[list[TensorStatistics], dict[str, str]]:
        """Write config and weights. Returns the statistics of each tensor and sha256 by file name of the shards."""
        component = self.component
        tensors = component.planned_tensors()
        sizes = {tensor.name: tensor.bytes(component.dtype) for tensor in tensors}
        statistics: list[TensorStatistics] = []

        def on_tensor(one: TensorStatistics) -> None:
            statistics.append(one)
            bar.advance(sizes[one.name], note=one.name)

        output = SafetensorsFormat(self.folder, component.dtype, STEMS[component.name], self.max_shard_size)
        hashes = write_safetensors(tensors, output, on_tensor, on_file)
        config = dict(component.config)
        if component.name == "text_encoder" and component.dtype is not None:
            config["dtype"] = torch_dtype_name(component.dtype)
        write_json(self.folder / "config.json", config)
        check_strict_load(self.folder, component.name)
        return statistics, hashes


def _write_lora_and_scheduler(prepared: PreparedExport, folder: Path) -> None:
    if prepared.lora_file is not None:
        tensors = [
            PlannedTensor(
                name, tuple(tensor.shape), tensor.dtype, partial(prepared.lora_file.tensors.__getitem__, name)
            )
            for name, tensor in prepared.lora_file.tensors.items()
        ]
        output = SafetensorsFormat(folder / "lora", None, LORA_STEM, "1TB", metadata=prepared.lora_file.metadata)
        write_safetensors(tensors, output, on_tensor=lambda statistics: None)
    if prepared.facts is not None:
        (folder / "scheduler").mkdir()
        config = diffusers_configs.scheduler_config(prepared.facts)
        write_json(folder / "scheduler" / "scheduler_config.json", config)


def _finish_read_back(read_back: ReadBack) -> None:
    """Wait until all shards are read back, with a progress bar if some are left."""
    left = read_back.pending_bytes()
    if not left:
        read_back.finish(lambda size, name: None)
        return
    with progress(left, "read back", unit="bytes") as bar:
        read_back.finish(lambda size, name: bar.advance(size, note=name))


# The content of export.json

NORM_EPS_NOTE = "1e-5, as published; SAT's last norm has 1e-6, which one config for all norms cannot state"


@dataclass(frozen=True)
class WrittenExport:
    """The result of an export: statistics of each component's tensors, sha256 of each file, and the checks of the
    components.

    ``tables``: see :func:`cogflow.export.export_plan.check_computed_tables`.
    """

    statistics: Mapping[str, list[TensorStatistics]]
    files: Mapping[str, str]
    proof: Mapping[str, ProofRecord]
    tables: Mapping[str, float] = field(default_factory=dict)


def export_record(prepared: PreparedExport, origin: ExportOrigin, written: WrittenExport) -> ExportRecord:
    """Return the content of export.json. The transformer's keys are at the top, other components' under
    ``components``."""
    facts = prepared.facts
    main = written.statistics.get("transformer", next(iter(written.statistics.values())))
    dtypes = {tensor.dtype_out for tensor in main}
    return ExportRecord(
        source=str(origin.place),
        kind=origin.kind,
        weights=origin.weights,
        run=origin.training.run,
        line=origin.training.line,
        step=origin.step,
        family=facts.family if facts else origin.training.family,
        model=origin.training.model,
        trained_with=facts.trained_with() if facts else origin.training.trained_with,
        facts=[FactRow(*row) for row in facts.rows()] if facts else [],
        dtype=dtype_name(getattr(torch, dtypes.pop())) if len(dtypes) == 1 else "mixed",
        source_files=dict(origin.files),
        files=dict(written.files),
        source_weights_sha256=_source_fingerprint(main),
        weights_sha256=_fingerprint(main),
        summary=summarise(main),
        lora=prepared.lora,
        ignored=prepared.ignored,
        dropped=[DroppedTensor(*one) for component in prepared.components for one in component.dropped],
        computed_tables=dict(written.tables),
        proof=dict(written.proof),
        norm_eps=NORM_EPS_NOTE if facts else None,
        diffusers=diffusers.__version__,
        torch=str(torch.__version__),
        tensors=main,
        components={
            name: ComponentWeights(summarise(tensors), _fingerprint(tensors), tensors)
            for name, tensors in written.statistics.items()
            if tensors is not main
        },
    )


def summarise(tensors: list[TensorStatistics]) -> CastSummary:
    """Return counts over all tensors and the largest change by the cast."""
    operations = [tensor.operation for tensor in tensors]
    rounded = [tensor.holds_only for tensor in tensors if tensor.holds_only]
    return CastSummary(
        tensors=len(tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        operations={kind: operations.count(kind) for kind in sorted(set(operations))},
        changed=max(tensor.changed for tensor in tensors),
        relative=max(tensor.relative for tensor in tensors),
        became_zero=sum(tensor.became_zero for tensor in tensors),
        became_subnormal=sum(tensor.became_subnormal for tensor in tensors),
        became_inf=sum(tensor.became_inf for tensor in tensors),
        holds_only={dtype: rounded.count(dtype) for dtype in sorted(set(rounded))},
    )


def refuse_nonfinite(prepared_from: str, statistics: Mapping[str, list[TensorStatistics]]) -> None:
    """Raise :class:`QualityGateError` naming the tensors with NaN or infinity before or after the cast."""
    tensors = [tensor for each in statistics.values() for tensor in each]
    problems = [f"{one.name}: {one.nonfinite} values that are not finite" for one in tensors if one.nonfinite]
    problems += [
        f"{one.name}: {one.became_inf} values beyond {one.dtype_out}'s range" for one in tensors if one.became_inf
    ]
    if problems:
        raise QualityGateError(
            f"{prepared_from} is not exported, because not every value would be finite:\n{format_list(problems)}",
            "Values beyond fp16's range fit into stage.dtype=bf16. NaN in a checkpoint means that training failed.",
        )


def _fingerprint(tensors: list[TensorStatistics]) -> str:
    """Return :func:`cogflow.weights.tensor_source.weights_fingerprint` of the written tensors."""
    return join_fingerprint(
        fingerprint_line(one.name, f"torch.{one.dtype_out}", tuple(one.shape), one.sha256) for one in tensors
    )


def _source_fingerprint(tensors: list[TensorStatistics]) -> str:
    """Return the fingerprint of the tensors before the cast."""
    return join_fingerprint(
        fingerprint_line(one.name, f"torch.{one.dtype_in}", tuple(one.shape), one.sha256_in) for one in tensors
    )
