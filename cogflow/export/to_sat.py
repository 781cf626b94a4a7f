"""Write prepared components as SAT's training code saves and loads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from cogflow.artifacts.identify import identify
from cogflow.errors import ConfigError, ConversionError, QualityGateError, format_list
from cogflow.export import sat_tables, sat_yaml
from cogflow.export.diffusers_configs import VAE_GROUPS, vae_config
from cogflow.export.export_plan import (
    ConvertedTensors,
    ExportComponent,
    ExportRequest,
    PreparedExport,
    make_plan,
    prepare_export,
)
from cogflow.export.facts import published_vae_facts
from cogflow.export.origin import ExportOrigin, open_origin
from cogflow.export.reported_values import FactValue
from cogflow.export.tensor_operations import Operation, inverse_table
from cogflow.export.to_diffusers import WrittenExport, export_record, refuse_nonfinite
from cogflow.files.atomic_write import require_space, write_json, write_text
from cogflow.files.hashing import hash_file
from cogflow.files.publish import publish_folder
from cogflow.files.record_io import ForeignObject, write_record
from cogflow.models.family import MODEL_SPECS
from cogflow.models.loading import dtype_name
from cogflow.records.export_records import ExportRecord, ProofRecord, TensorStatistics
from cogflow.runtime.progress import Advancing, progress
from cogflow.weights.tensor_source import RenamedTensors, read_json
from cogflow.weights.weights_writer import PlannedTensor, write_torch_file

MODEL_FILE = "mp_rank_00_model_states.pt"
VAE_FILE = "vae/3d-vae.pt"


def export_sat(
    prepared: PreparedExport, origin: ExportOrigin, output: Path, given: Mapping[str, FactValue]
) -> ExportRecord:
    """Publish a SAT save folder at ``output`` and return the content of its export.json.

    The folder holds ``latest``, ``<iteration>/mp_rank_00_model_states.pt``, yaml and json files, and
    ``vae/3d-vae.pt`` if the VAE was requested. The written weights are read back, converted to diffusers' layout and
    compared to the bit. ``given``: facts that the user gives. Raises :class:`ConfigError` if the yaml needs a fact
    that is unknown.
    """
    components = {component.name: component for component in prepared.components}
    sat_components = {name: to_sat_layout(component) for name, component in components.items()}
    if "transformer" not in components:
        raise ConfigError(
            "stage.to=sat writes a transformer, and the VAE beside it.", "Set stage.components=[transformer,vae]."
        )
    _require_sat_norms(components.get("vae"))
    configs = _yaml_configs(components, origin, prepared, given)
    total = sum(tensor.bytes(one.dtype) for one in sat_components.values() for tensor in one.planned_tensors())
    require_space(output, total)
    iteration = origin.step if origin.step is not None else 1
    statistics: dict[str, list[TensorStatistics]] = {name: [] for name in sat_components}
    files: dict[str, str] = {}
    with publish_folder(output, replace=True, known=files) as partial:
        engine = [one for name, one in sat_components.items() if name != "vae"]
        with progress(total, "export", unit="bytes") as bar:
            engine_file = _TorchComponents(engine, "module", {"iteration": iteration})
            engine_file.write(partial / str(iteration) / MODEL_FILE, statistics, bar)
            if "vae" in sat_components:
                vae_file = _TorchComponents([sat_components["vae"]], "state_dict", {})
                vae_file.write(partial / VAE_FILE, statistics, bar)
        refuse_nonfinite(str(origin.place), statistics)
        write_text(partial / "latest", str(iteration))
        _write_configs(partial, configs, sat_components["transformer"].dtype)
        proof = _compare_with_read_back(components, partial)
        written = sorted(path for path in partial.rglob("*") if path.is_file())
        files |= {str(path.relative_to(partial)): hash_file(path) for path in written}
        sat_export = PreparedExport(list(sat_components.values()), prepared.facts, prepared.lora)
        record = export_record(sat_export, origin, WrittenExport(statistics, files, proof))
        write_record(partial / ExportRecord.file_name, record)
    return record


def _require_sat_norms(vae: ExportComponent | None) -> None:
    groups = vae.config.get("norm_num_groups", VAE_GROUPS) if vae else VAE_GROUPS
    if groups != VAE_GROUPS:
        raise ConversionError(
            f"This VAE normalises in {groups} groups, SAT's code always in {VAE_GROUPS}.",
            "Export the transformer without the VAE: stage.components=[transformer].",
        )


@dataclass(frozen=True)
class _TorchComponents:
    """Components in one .pt file: ``{key: tensors, **beside}``."""

    components: list[ExportComponent]
    key: str
    beside: dict[str, int]

    def write(self, path: Path, statistics: Mapping[str, list[TensorStatistics]], bar: Advancing) -> None:
        """Write the file and append the statistics of each tensor to its component's list."""
        path.parent.mkdir(parents=True, exist_ok=True)
        owners = {tensor.name: one for one in self.components for tensor in one.planned_tensors()}
        tensors = [tensor for one in self.components for tensor in one.planned_tensors()]
        sizes = {tensor.name: tensor.bytes(owners[tensor.name].dtype) for tensor in tensors}

        def dtype_of(tensor: PlannedTensor) -> torch.dtype:
            return tensor.target(owners[tensor.name].dtype)

        def on_tensor(one: TensorStatistics) -> None:
            statistics[owners[one.name].name].append(one)
            bar.advance(sizes[one.name], note=one.name)

        write_torch_file(path, tensors, key=self.key, beside=self.beside, dtype_of=dtype_of, on_tensor=on_tensor)


@dataclass(frozen=True)
class _YamlConfigs:
    """diffusers' configs that SAT's yaml is written from."""

    transformer: ForeignObject
    scheduler: ForeignObject
    vae: ForeignObject


def _yaml_configs(
    components: Mapping[str, ExportComponent],
    origin: ExportOrigin,
    prepared: PreparedExport,
    given: Mapping[str, FactValue],
) -> _YamlConfigs:
    """Return the configs, with SNR shift and scaling factor from the user, the training, or the pipeline beside the
    source."""
    trained_with = origin.training.trained_with
    known: dict[str, Any] = dict(trained_with.known()) if trained_with is not None else {}
    scheduler: dict[str, Any] = {}
    vae = dict(components["vae"].config) if "vae" in components else {}
    if "transformer" in origin.folders:
        pipeline = origin.folders["transformer"].parent
        scheduler = _read_config(pipeline / "scheduler" / "scheduler_config.json")
        vae = vae or _read_config(pipeline / "vae" / "config.json")
    if prepared.facts is not None:
        known |= prepared.facts.trained_with().known()
    known |= given
    shift = known.get("snr_shift_scale", scheduler.get("snr_shift_scale"))
    scale = known.get("scaling_factor", vae.get("scaling_factor"))
    values = {"snr_shift_scale": shift, "scaling_factor": scale}
    missing = [f"stage.facts.{key}" for key, value in values.items() if value is None]
    if missing:
        raise ConfigError(
            f"{origin.place} does not state what SAT's yaml needs: {' and '.join(missing)}.",
            "Give them; 5B models have 1.0 and 0.7, 2B has 3.0 and 1.15258426.",
        )
    # For a source without a pipeline beside it. The members of the family differ only in the two values given above.
    scheduler_defaults = MODEL_SPECS["cogvideox-5b"].scheduler_config()
    vae_defaults = vae_config(published_vae_facts("cogvideox-5b"))
    return _YamlConfigs(
        transformer=components["transformer"].config,
        scheduler=scheduler_defaults | scheduler | {"snr_shift_scale": shift},
        vae=vae_defaults | vae | {"scaling_factor": scale},
    )


def _read_config(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _write_configs(folder: Path, configs: _YamlConfigs, dtype: torch.dtype | None) -> None:
    """Write model_config.json, the per-model yaml and the merged training_config.yaml."""
    write_json(folder / "model_config.json", sat_yaml.model_config(configs.transformer))
    model = sat_yaml.model_yaml(configs.transformer, configs.scheduler, configs.vae)
    write_text(folder / "configs" / "model.yaml", yaml.safe_dump(model, sort_keys=False))
    training = sat_yaml.training_config(model, "fp32" if dtype is None else dtype_name(dtype))
    write_text(folder / "training_config.yaml", yaml.safe_dump(training, sort_keys=False))


def _compare_with_read_back(components: Mapping[str, ExportComponent], folder: Path) -> dict[str, ProofRecord]:
    """Read the written files, convert them to diffusers' layout and compare every value with the exported one."""
    proof = {}
    for name, component in components.items():
        path = folder / VAE_FILE if name == "vae" else folder
        configs = [str(folder / "training_config.yaml")] if name == "vae" else []
        origin = open_origin(identify(path), [name], weights="model", configs=configs)
        read_back = prepare_export(origin, ExportRequest([name])).components[0].tensors
        tensors = component.tensors
        different = [
            tensor.name
            for tensor in component.planned_tensors()
            if not torch.equal(
                tensors.read(tensor.name).to(tensor.target(component.dtype)), read_back.read(tensor.name)
            )
        ]
        if different or read_back.tensors.keys() != tensors.tensors.keys():
            raise QualityGateError(
                f"{name} differs after it was read back from SAT's layout:\n{format_list(different)}",
                "Nothing is published.",
            )
        proof[name] = ProofRecord("read back and converted again, equal to the bit", tensors=len(tensors.tensors))
    return proof


def to_sat_layout(component: ExportComponent) -> ExportComponent:
    """Return the component under SAT's names, by the inverse of the table from SAT to diffusers."""
    tables: dict[str, Callable[[ForeignObject], tuple[Operation, ...]]] = {
        "transformer": sat_tables.transformer_table,
        "vae": sat_tables.vae_table,
        "text_encoder": sat_tables.text_encoder_table,
    }
    prefixes = {
        "transformer": sat_tables.TRANSFORMER_PREFIX,
        "vae": "",  # 3d-vae.pt has no prefix
        "text_encoder": sat_tables.TEXT_ENCODER_PREFIX,
    }
    plan = make_plan(inverse_table(tables[component.name](component.config)), component.tensors.tensors)
    view = ConvertedTensors(plan, component.tensors)
    prefix = prefixes[component.name]
    named = RenamedTensors(view, {prefix + name: name for name in view.tensors})
    return ExportComponent(
        component.name,
        named,
        component.config,
        dtype=component.dtype,
        plan=plan,
        source=component.tensors,
        prefix=prefix,
    )
