"""A component on its way out: its tensors under diffusers' names, what each was made of, and its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from cogflow.errors import ConfigError, ConversionError
from cogflow.export import diffusers_configs, lora, sat_components, text_encoder_table, transformer_table, vae_table
from cogflow.export.algebra import Operation, invert
from cogflow.export.facts import Facts, gather, gather_vae, of_family
from cogflow.export.mapping_plan import Converted, MappingPlan, differences, make_plan
from cogflow.export.origin import ExportOrigin
from cogflow.models.loading import DTYPES
from cogflow.weights.cast_statistics import torch_dtype_name
from cogflow.weights.strict_loading import STEMS, expected_shapes, meta_model, ordered_tensor_names
from cogflow.weights.tensor_source import RenamedTensors, TensorSource, WeightsFolder, read_json
from cogflow.weights.weights_writer import PlannedTensor

ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 2e-5}
"""How far a table of sines that a checkpoint holds may be from the computed one: the rounding of its dtype, with room."""


@dataclass(frozen=True)
class Component:
    """``dtype``: what to cast to, ``None`` for as stored. ``plan`` and ``source`` are there when it was converted."""

    name: str
    tensors: TensorSource
    config: dict[str, Any]
    dtype: torch.dtype | None = None
    plan: MappingPlan | None = None
    source: TensorSource | None = None
    prefix: str = ""  # before the names that the plan has

    def outputs(self) -> list[PlannedTensor]:
        """In the order of the tensors."""
        made = {self.prefix + target: step for step in self.plan.steps for target in step.targets} if self.plan else {}
        outputs = []
        for name, info in self.tensors.tensors.items():
            step = made.get(name)
            sources = tuple(step.sources) if step else (name,)
            operation = str(step.operation.describe()["operation"]) if step else "copy"
            outputs.append(
                PlannedTensor(name, info.shape, info.dtype, _reading(self.tensors, name), sources, operation)
            )
        return outputs

    @property
    def dropped(self) -> list[tuple[str, str]]:
        return self.plan.dropped if self.plan else []


@dataclass(frozen=True)
class PreparedExport:
    """What an export will write. ``adapters``: tensors and header of a separate LoRA file. ``ignored``: how many tensors of which
    component are in the source and were not asked for."""

    components: list[Component]
    facts: Facts | None = None
    adapters: tuple[dict[str, torch.Tensor], dict[str, str]] | None = None
    adapted: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)


def prepare(
    origin: ExportOrigin, wanted: list[str], family: str, given: Mapping[str, Any], dtype: str, separate_lora: bool
) -> PreparedExport:
    """Plan every component without reading a value of its weights.

    Raises :class:`ConversionError` and :class:`ConfigError` with everything that does not fit, before anything is written.
    """
    if origin.tensors is None:
        return PreparedExport([_stored(name, origin, dtype) for name in wanted])
    found = sat_components.split(origin.tensors)
    if found.transformer is None and any("transformer_blocks." in name for name in origin.tensors.tensors):
        return PreparedExport([_foreign(origin, family, dtype)])
    held = {name: part for name in ("transformer", "vae", "text_encoder") if (part := getattr(found, name)) is not None}
    missing = [name for name in wanted if name not in held]
    if missing:
        raise ConversionError(
            f"{origin.place} holds no {' and no '.join(missing)}. It holds: {', '.join(held) or 'nothing that is known'}"
            + (f", and {len(found.other)} other tensors such as {found.other[0]}." if found.other else "."),
            f"Set stage.components=[{','.join(held)}]." if held else "Is this a CogVideoX checkpoint?",
        )
    ignored = {name: len(part.tensors) for name, part in held.items() if name not in wanted}
    ignored |= {"other": len(found.other)} if found.other else {}
    facts: Facts | None = None
    adapters: tuple[dict[str, torch.Tensor], dict[str, str]] | None = None
    adapted: dict[str, Any] = {}
    made: list[Component] = []
    if "transformer" in wanted:
        facts = gather(held["transformer"].tensors, origin.yamls, family, given)
        component, adapters, adapted = _transformer(held["transformer"], facts, dtype, separate_lora)
        made.append(component)
    if "vae" in wanted:
        made.append(_vae(held["vae"], origin, family, given, facts))
    if "text_encoder" in wanted:
        made.append(_text_encoder(held["text_encoder"]))
    return PreparedExport(made, facts, adapters, adapted, ignored)


def check_tables(component: Component) -> dict[str, float]:
    """Compare the tables that the checkpoint holds and diffusers computes. Raises :class:`ConversionError` where they disagree."""
    if component.plan is None or component.source is None:
        return {}
    found = differences(component.plan, component.source)
    for name, value in found.items():
        info = component.source.tensors[name]
        if not value <= ROUNDING.get(info.dtype, 2e-5):
            raise ConversionError(
                f"{name} {list(info.shape)} is not the table that diffusers will compute: they differ by {value:.3g}, where rounding to "
                f"{torch_dtype_name(info.dtype)} gives at most {ROUNDING.get(info.dtype, 2e-5):.3g}.",
                "The model saw other positions: check latent_frames, latent_height, latent_width and the interpolation scales.",
            )
    return found


def _transformer(
    source: TensorSource, facts: Facts, dtype: str, separate: bool
) -> tuple[Component, Any, dict[str, Any]]:
    view, adapters, adapted = source, None, {}
    config = diffusers_configs.transformer_config(facts)
    table = transformer_table.table(config)
    found = lora.find_lora(source)
    if found is not None:
        alpha = float(facts["lora_alpha"])
        adapted = {
            **found.describe(),
            "alpha": alpha,
            "scale": alpha / found.rank,
            "how": "separate" if separate else "merged",
        }
        if separate:
            adapters, view = lora.to_diffusers_lora(source, table, alpha), lora.base(source)
        else:
            # Summed and kept in fp32 until the cast of the export, which says what it costs.
            view = lora.merged(source, alpha, facts.get("lora_rank"), torch.float32)
    plan = make_plan(table, view.tensors, expected_shapes(meta_model(config, "the config of these facts")))
    target = DTYPES[facts["dtype"] if dtype == "auto" else dtype]
    return Component("transformer", Converted(plan, view), config, target, plan, view), adapters, adapted


def _vae(
    source: TensorSource, origin: ExportOrigin, family: str, given: Mapping[str, Any], facts: Facts | None
) -> Component:
    """Always as stored: an autoencoder in half precision blurs what every other part does right."""
    known = dict(given)
    if facts is not None:  # settled already; of two exports from one file both must say the same
        known = {key: facts[key] for key in ("scaling_factor", "invert_scale_latents", "dtype")} | known
    config = diffusers_configs.vae_config(gather_vae(source.tensors, origin.yamls, family, known))
    plan = make_plan(
        vae_table.table(config, source.tensors),
        source.tensors,
        expected_shapes(meta_model(config, "the VAE's config", "vae")),
    )
    return Component("vae", Converted(plan, source), config, None, plan, source)


def _text_encoder(source: TensorSource) -> Component:
    dtypes = {info.dtype for info in source.tensors.values()}
    name = {value: key for key, value in DTYPES.items()}.get(dtypes.pop(), "fp32") if len(dtypes) == 1 else "fp32"
    config = diffusers_configs.t5_config(source.tensors, name)
    expected = expected_shapes(meta_model(config, "the text encoder's config", "text_encoder"))
    plan = make_plan(text_encoder_table.table(config, source.tensors), source.tensors, expected)
    return Component("text_encoder", Converted(plan, source), config, None, plan, source)


def _stored(name: str, origin: ExportOrigin, dtype: str) -> Component:
    """A component that is in diffusers' layout already."""
    if name not in origin.folders:
        raise ConversionError(
            f"{origin.place} holds no {name}. It holds: {', '.join(origin.folders)}.",
            f"Set stage.components=[{','.join(origin.folders)}].",
        )
    folder = origin.folders[name]
    weights = WeightsFolder(folder, STEMS[name])
    settings = read_json(folder / "config.json")
    order = ordered_tensor_names(weights, meta_model(settings, folder / "config.json", name))
    config = {key: value for key, value in settings.items() if key != "_name_or_path"}
    if name != "text_encoder":
        config["_diffusers_version"] = diffusers.__version__
    return Component(
        name,
        RenamedTensors(weights, {tensor: tensor for tensor in order}),
        config,
        _dtype(dtype, origin) if name == "transformer" else None,
    )


def _foreign(origin: ExportOrigin, family: str, dtype: str) -> Component:
    """A transformer in diffusers' names but without its folder, as trainers built on diffusers leave it under DeepSpeed."""
    tensors = origin.tensors
    assert tensors is not None
    prefix = next(name for name in tensors.tensors if "transformer_blocks." in name).partition("transformer_blocks.")[0]
    view = RenamedTensors(
        tensors, {name.removeprefix(prefix): name for name in tensors.tensors if name.startswith(prefix)}
    )
    config = dict(origin.json or {})
    if not config:
        if family == "auto":
            raise ConfigError(
                f"{origin.place} holds a transformer in diffusers' names, but neither heads nor positions show in its tensors.",
                "Name its config: stage.config=[PATH of the transformer's config.json], or model=NAME.",
            )
        config = diffusers_configs.transformer_config(of_family(family))
    expected = expected_shapes(meta_model(config, "the transformer's config"))
    problems = sorted(expected.keys() ^ view.tensors.keys())
    problems += [name for name, info in view.tensors.items() if expected.get(name, info.shape) != info.shape]
    if problems:
        raise ConversionError(
            f"{origin.place} is not of this config: {len(problems)} tensors are missing, extra or of another shape, such as {problems[0]}.",
            "Is it another member of the family?",
        )
    return Component(
        "transformer", RenamedTensors(view, {name: name for name in expected}), config, _dtype(dtype, origin)
    )


def _dtype(asked: str, origin: ExportOrigin) -> torch.dtype | None:
    """auto: the one the transformer was trained in; ``None`` (as stored) where nothing tells it."""
    name = asked
    if asked == "auto":
        trained = origin.trainer.get("trained_with") or {}
        if not trained.get("dtype"):
            return None
        name = str(trained["dtype"])
    if name not in DTYPES:
        raise ConfigError(f"stage.dtype={asked}: {name} is unknown.", f"Choose auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def to_sat(component: Component) -> Component:
    """The same component under SAT's names, by the inverse of the same table."""
    tables: dict[str, Callable[[Mapping[str, Any]], tuple[Operation, ...]]] = {
        "transformer": transformer_table.table, "vae": vae_table.table, "text_encoder": text_encoder_table.table,
    }  # fmt: skip
    prefixes = {
        "transformer": sat_components.TRANSFORMER,
        "vae": "",
        "text_encoder": sat_components.text_encoder_prefix(),
    }
    back = make_plan(invert(tables[component.name](component.config)), component.tensors.tensors)
    view = Converted(back, component.tensors)
    prefix = prefixes[component.name]
    named = RenamedTensors(view, {prefix + name: name for name in view.tensors})
    return Component(component.name, named, component.config, component.dtype, back, component.tensors, prefix)


def _reading(tensors: TensorSource, name: str) -> Any:
    return lambda: tensors.read(name)
