"""The way back: components written as SAT's training code saves and loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from cogflow.artifacts.identify import identify
from cogflow.errors import ConfigError, ConversionError, QualityGateError, format_list
from cogflow.export import sat_yaml
from cogflow.export.component import Component, PreparedExport, prepare, to_sat
from cogflow.export.diffusers_configs import VAE_GROUPS
from cogflow.export.origin import ExportOrigin, open_origin
from cogflow.export.to_diffusers import Report, describe, refuse_nonfinite
from cogflow.files.atomic_write import require_space, write_json, write_text
from cogflow.files.hashing import hash_file
from cogflow.files.publish import publish_folder
from cogflow.models.family import MODEL_SPECS
from cogflow.models.loading import dtype_name
from cogflow.weights.cast_statistics import TensorStatistics
from cogflow.weights.tensor_source import read_json
from cogflow.weights.weights_writer import write_torch_file

VAE_FILE = "vae/3d-vae.pt"
PUBLISHED_VAE = {
    "block_out_channels": [128, 256, 256, 512], "layers_per_block": 3, "latent_channels": 16, "in_channels": 3, "out_channels": 3,
    "temporal_compression_ratio": 4,
}  # fmt: skip
"""The one autoencoder of the family, for a yaml beside a transformer whose own VAE is not at hand."""


def export_sat(
    prepared: PreparedExport, origin: ExportOrigin, output: Path, given: Mapping[str, Any], report: Report
) -> dict[str, Any]:
    """Publish a SAT save folder at ``output``: ``latest``, ``<iteration>/mp_rank_00_model_states.pt``, yaml and json beside, and the
    VAE as ``vae/3d-vae.pt`` where it was asked for; with ``export.json``, whose content is returned.

    What was written is read back through the forward table and compared to the bit. Raises :class:`ConfigError` for facts that
    the yaml needs and nothing settles.
    """
    components = {component.name: component for component in prepared.components}
    back = {name: to_sat(component) for name, component in components.items()}
    if "transformer" not in components:
        raise ConfigError(
            "stage.to=sat writes a transformer, and the VAE beside it.", "Set stage.components=[transformer,vae]."
        )
    groups = components["vae"].config.get("norm_num_groups", VAE_GROUPS) if "vae" in components else VAE_GROUPS
    if groups != VAE_GROUPS:
        raise ConversionError(
            f"This VAE normalises in {groups} groups, SAT's code always in {VAE_GROUPS}.",
            "Export the transformer alone, without the vae.",
        )
    settings = _settings(components, origin, prepared, given)
    needed = sum(one.bytes(component.dtype) for component in back.values() for one in component.outputs())
    require_space(output, needed)
    iteration = origin.step if origin.step is not None else 1
    facts: dict[str, list[TensorStatistics]] = {name: [] for name in back}
    files: dict[str, str] = {}
    with publish_folder(output, replace=True, known=files) as partial:
        with report(needed, "export") as bar:
            engine = [name for name in back if name != "vae"]
            folder = partial / str(iteration)
            folder.mkdir()
            for place, names, key, beside in (
                (folder / "mp_rank_00_model_states.pt", engine, "module", {"iteration": iteration}),
                (partial / VAE_FILE, ["vae"] if "vae" in back else [], "state_dict", {}),
            ):
                if names:
                    _write(place, [back[name] for name in names], key, beside, facts, bar)
        refuse_nonfinite([fact for each in facts.values() for fact in each], origin.place)
        write_text(partial / "latest", str(iteration))
        write_json(partial / "model_config.json", sat_yaml.model_config(components["transformer"].config))
        model = sat_yaml.model_yaml(*settings)
        write_text(partial / "configs" / "model.yaml", yaml.safe_dump(model, sort_keys=False))
        dtype = back["transformer"].dtype
        training = sat_yaml.training_config(model, "fp32" if dtype is None else dtype_name(dtype))
        write_text(partial / "training_config.yaml", yaml.safe_dump(training, sort_keys=False))
        proof = _prove(components, partial)
        files |= {
            str(path.relative_to(partial)): hash_file(path) for path in sorted(partial.rglob("*")) if path.is_file()
        }
        description = describe(
            PreparedExport(list(back.values()), prepared.facts, None, prepared.adapted), origin, facts, files, proof, {}
        )
        write_json(partial / "export.json", description)
    return description


def _write(
    path: Path,
    components: list[Component],
    key: str,
    beside: dict[str, Any],
    facts: dict[str, list[TensorStatistics]],
    bar: Any,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    owners = {output.name: component for component in components for output in component.outputs()}
    outputs = [output for component in components for output in component.outputs()]
    sizes = {output.name: output.bytes(owners[output.name].dtype) for output in outputs}

    def note(fact: TensorStatistics) -> None:
        facts[owners[fact.name].name].append(fact)
        bar.advance(sizes[fact.name], note=fact.name)

    write_torch_file(path, outputs, key, beside, lambda output: output.target(owners[output.name].dtype), note)


def _settings(
    components: Mapping[str, Component], origin: ExportOrigin, prepared: PreparedExport, given: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """Configs of transformer, scheduler and VAE, for the yaml."""
    transformer = components["transformer"].config
    known: dict[str, Any] = dict(origin.trainer.get("trained_with") or {})
    pipeline = origin.folders["transformer"].parent if "transformer" in origin.folders else None
    scheduler: dict[str, Any] = {}
    vae = dict(components["vae"].config) if "vae" in components else {}
    if pipeline is not None:
        if (pipeline / "scheduler" / "scheduler_config.json").is_file():
            scheduler = read_json(pipeline / "scheduler" / "scheduler_config.json")
        if not vae and (pipeline / "vae" / "config.json").is_file():
            vae = read_json(pipeline / "vae" / "config.json")
    if prepared.facts is not None:
        known |= prepared.facts.trained_with()
    known |= given
    shift = known.get("snr_shift_scale", scheduler.get("snr_shift_scale"))
    scale = known.get("scaling_factor", vae.get("scaling_factor"))
    missing = [
        f"stage.facts.{key}" for key, value in (("snr_shift_scale", shift), ("scaling_factor", scale)) if value is None
    ]
    if missing:
        raise ConfigError(
            f"{origin.place} does not tell what SAT's yaml needs: {' and '.join(missing)}.",
            "Give them; 5B models have 1.0 and 0.7, 2B 3.0 and 1.15258426.",
        )
    plain = MODEL_SPECS["cogvideox-5b"].scheduler_config()
    return transformer, plain | scheduler | {"snr_shift_scale": shift}, PUBLISHED_VAE | vae | {"scaling_factor": scale}


def _prove(components: Mapping[str, Component], folder: Path) -> dict[str, Any]:
    """Read back what was written and send it through the forward table: every value must be the one that went in."""
    proof = {}
    for name, component in components.items():
        place = folder / VAE_FILE if name == "vae" else folder
        configs = [str(folder / "training_config.yaml")] if name == "vae" else []
        origin = open_origin(identify(place), [name], weights="model", configs=configs)
        again = prepare(origin, [name], "auto", {}, "auto", False).components[0]
        wrong = []
        for tensor, info in component.tensors.tensors.items():
            sent = component.tensors.read(tensor)
            target = component.dtype if component.dtype is not None and info.dtype.is_floating_point else info.dtype
            if not torch.equal(sent.to(target), again.tensors.read(tensor)):
                wrong.append(tensor)
        if wrong or again.tensors.tensors.keys() != component.tensors.tensors.keys():
            raise QualityGateError(
                f"{name} does not come back from SAT's layout as it went:\n{format_list(wrong)}",
                "Nothing is published.",
            )
        proof[name] = {
            "what": "read back and converted again, equal to the bit",
            "tensors": len(component.tensors.tensors),
        }
    return proof
