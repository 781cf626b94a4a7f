"""Plan an export: match tensors with the tables of operations, and describe every component that is written.

Every source tensor must have one use and every target tensor one origin; otherwise nothing is converted. No value is
read until the components are written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import diffusers
import torch

from cogflow.errors import ConfigError, ConversionError, format_list
from cogflow.export import diffusers_configs, sat_tables
from cogflow.export.diffusers_configs import DiffusersConfig
from cogflow.export.facts import TransformerFacts, published_facts, resolve_facts, resolve_vae_facts
from cogflow.export.lora import LoraFile, find_lora, merge_lora, to_diffusers_lora, without_lora
from cogflow.export.origin import ExportOrigin
from cogflow.export.reported_values import FactValue
from cogflow.export.tensor_operations import Drop, Operation, Shape
from cogflow.files.record_io import JsonObject
from cogflow.models.loading import DTYPES
from cogflow.weights.strict_loading import STEMS, expected_shapes, meta_model, ordered_tensor_names
from cogflow.weights.tensor_source import RenamedTensors, TensorInfo, TensorSource, WeightsFolder, read_json
from cogflow.weights.weights_writer import PlannedTensor, torch_dtype_name

TABLE_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 2e-5}
"""Largest difference between a stored position table and the computed one: the dtype's rounding, with a margin."""


@dataclass(frozen=True)
class ExportRequest:
    """The components to export and the options.

    ``components``: any of transformer, vae and text_encoder. ``family``: auto, or the member that the weights must
    belong to. ``facts``: facts that the user gives. ``dtype``: auto (the dtype of training), fp32, bf16 or fp16; only
    the transformer is cast. ``separate_lora``: write a LoRA as its own file instead of merging it.
    """

    components: Sequence[str]
    family: str = "auto"
    facts: Mapping[str, FactValue] = field(default_factory=dict)
    dtype: str = "auto"
    separate_lora: bool = False


@dataclass(frozen=True)
class ExportComponent:
    """One component to write.

    ``config``: content of its ``config.json``. ``dtype``: cast floating tensors to it, ``None`` to keep theirs.
    ``plan`` and ``source``: how ``tensors`` are made and from what, for a converted component. ``prefix``: added
    before the plan's names.
    """

    name: str
    tensors: TensorSource
    config: DiffusersConfig
    dtype: torch.dtype | None = None
    plan: MappingPlan | None = None
    source: TensorSource | None = None
    prefix: str = ""

    def planned_tensors(self) -> list[PlannedTensor]:
        """Return the tensors to write, in their order."""
        steps = {self.prefix + target: step for step in self.plan.steps for target in step.targets} if self.plan else {}
        planned = []
        for name, info in self.tensors.tensors.items():
            step = steps.get(name)
            sources = step.sources if step else (name,)
            operation = step.operation.kind if step else "copy"
            read = partial(self.tensors.read, name)
            planned.append(PlannedTensor(name, info.shape, info.dtype, read, sources=sources, operation=operation))
        return planned

    @property
    def dropped(self) -> list[tuple[str, str]]:
        """(source, reason) of every dropped tensor."""
        return self.plan.dropped if self.plan else []


@dataclass(frozen=True)
class PreparedExport:
    """The planned content of an export.

    ``lora``: description of the source's LoRA, for export.json. ``lora_file``: content of a separate LoRA file.
    ``ignored``: number of tensors by component that the source holds and that were not requested.
    """

    components: list[ExportComponent]
    facts: TransformerFacts | None = None
    lora: JsonObject | None = None
    lora_file: LoraFile | None = None
    ignored: dict[str, int] = field(default_factory=dict)

    def written_bytes(self) -> int:
        """Return the size of all weights to write."""
        total = sum(tensor.bytes(one.dtype) for one in self.components for tensor in one.planned_tensors())
        return total + (sum(tensor.nbytes for tensor in self.lora_file.tensors.values()) if self.lora_file else 0)


def prepare_export(origin: ExportOrigin, request: ExportRequest) -> PreparedExport:
    """Plan every component without reading a value of its weights.

    Raises :class:`ConversionError` and :class:`ConfigError` listing everything that does not fit, before anything is
    written.
    """
    if origin.tensors is None:
        return PreparedExport([_from_diffusers_folder(name, origin, request.dtype) for name in request.components])
    found = sat_tables.split_components(origin.tensors)
    if found.transformer is None and any("transformer_blocks." in name for name in origin.tensors.tensors):
        return PreparedExport([_transformer_with_diffusers_names(origin, origin.tensors, request)])
    views = {"transformer": found.transformer, "vae": found.vae, "text_encoder": found.text_encoder}
    present = {name: view for name, view in views.items() if view is not None}
    _require_components(origin, request, present, found.other)
    ignored = {name: len(view.tensors) for name, view in present.items() if name not in request.components}
    ignored |= {"other": len(found.other)} if found.other else {}
    result = PreparedExport([], ignored=ignored)
    if "transformer" in request.components:
        facts = resolve_facts(present["transformer"].tensors, origin.yamls, request.family, request.facts)
        result = _prepare_transformer(present["transformer"], facts, request, ignored)
    if "vae" in request.components:
        result.components.append(_prepare_vae(present["vae"], origin, request, result.facts))
    if "text_encoder" in request.components:
        result.components.append(_prepare_text_encoder(present["text_encoder"]))
    return result


def check_computed_tables(component: ExportComponent) -> dict[str, float]:
    """Return the largest difference of each stored position table from the one that diffusers computes.

    Raises :class:`ConversionError` for a difference beyond the rounding of the stored dtype.
    """
    if component.plan is None or component.source is None:
        return {}
    found = computed_table_differences(component.plan, component.source)
    for name, value in found.items():
        info = component.source.tensors[name]
        tolerance = TABLE_TOLERANCE.get(info.dtype, 2e-5)
        if not value <= tolerance:
            raise ConversionError(
                f"{name} {list(info.shape)} is not the table that diffusers will compute: they differ by {value:.3g}, "
                f"where rounding to {torch_dtype_name(info.dtype)} gives at most {tolerance:.3g}.",
                "The model was trained with other positions: check latent_frames, latent_height, latent_width and the "
                "interpolation scales.",
            )
    return found


def _require_components(
    origin: ExportOrigin, request: ExportRequest, present: Mapping[str, RenamedTensors], other: list[str]
) -> None:
    missing = [name for name in request.components if name not in present]
    if not missing:
        return
    others = f", and {len(other)} other tensors such as {other[0]}." if other else "."
    raise ConversionError(
        f"{origin.place} holds no {' and no '.join(missing)}. "
        f"It holds: {', '.join(present) or 'nothing known'}{others}",
        f"Set stage.components=[{','.join(present)}]." if present else "Check that it is a CogVideoX checkpoint.",
    )


def _prepare_transformer(
    source: TensorSource, facts: TransformerFacts, request: ExportRequest, ignored: dict[str, int]
) -> PreparedExport:
    config = diffusers_configs.transformer_config(facts)
    table = sat_tables.transformer_table(config)
    view = source
    description: JsonObject | None = None
    lora_file = None
    found = find_lora(source)
    if found is not None:
        assert facts.lora_alpha is not None  # resolve_facts requires it for a checkpoint with LoRA
        alpha = float(facts.lora_alpha)
        description = {
            "rank": found.rank,
            "adapted layers": len(found.layers),
            "alpha": alpha,
            "scale": alpha / found.rank,
            "how": "separate" if request.separate_lora else "merged",
        }
        if request.separate_lora:
            lora_file = to_diffusers_lora(source, table, alpha)
            view = without_lora(source)
        else:
            # The sum stays in fp32 until the cast of the export, which is measured.
            view = merge_lora(source, alpha, facts.lora_rank, torch.float32)
    plan = make_plan(table, view.tensors, expected_shapes(meta_model(config, "the config of these facts")))
    component = ExportComponent(
        "transformer",
        ConvertedTensors(plan, view),
        config,
        dtype=DTYPES[facts.dtype if request.dtype == "auto" else request.dtype],
        plan=plan,
        source=view,
    )
    return PreparedExport([component], facts, description, lora_file, ignored)


def _prepare_vae(
    source: TensorSource, origin: ExportOrigin, request: ExportRequest, facts: TransformerFacts | None
) -> ExportComponent:
    """Plan the VAE, which always keeps its dtype: a VAE in half precision blurs the videos of a correct transformer."""
    known = dict(request.facts)
    if facts is not None:  # the VAE must agree with the transformer from the same checkpoint
        of_transformer: dict[str, FactValue] = {
            "scaling_factor": facts.scaling_factor,
            "invert_scale_latents": facts.invert_scale_latents,
            "dtype": facts.dtype,
        }
        known = of_transformer | known
    config = diffusers_configs.vae_config(resolve_vae_facts(source.tensors, origin.yamls, request.family, known))
    expected = expected_shapes(meta_model(config, "the VAE's config", "vae"))
    plan = make_plan(sat_tables.vae_table(config, source.tensors), source.tensors, expected)
    return ExportComponent("vae", ConvertedTensors(plan, source), config, plan=plan, source=source)


def _prepare_text_encoder(source: TensorSource) -> ExportComponent:
    dtypes = {info.dtype for info in source.tensors.values()}
    names = {value: key for key, value in DTYPES.items()}
    config = diffusers_configs.t5_config(
        source.tensors, names.get(dtypes.pop(), "fp32") if len(dtypes) == 1 else "fp32"
    )
    expected = expected_shapes(meta_model(config, "the text encoder's config", "text_encoder"))
    plan = make_plan(sat_tables.text_encoder_table(config, source.tensors), source.tensors, expected)
    return ExportComponent("text_encoder", ConvertedTensors(plan, source), config, plan=plan, source=source)


def _from_diffusers_folder(name: str, origin: ExportOrigin, dtype: str) -> ExportComponent:
    """Plan a component that is in diffusers' layout already."""
    if name not in origin.folders:
        raise ConversionError(
            f"{origin.place} holds no {name}. It holds: {', '.join(origin.folders)}.",
            f"Set stage.components=[{','.join(origin.folders)}].",
        )
    folder = origin.folders[name]
    weights = WeightsFolder(folder, STEMS[name])
    settings = read_json(folder / "config.json")
    names = ordered_tensor_names(weights, meta_model(settings, folder / "config.json", name))
    config = {key: value for key, value in settings.items() if key != "_name_or_path"}
    if name != "text_encoder":
        config["_diffusers_version"] = diffusers.__version__
    view = RenamedTensors(weights, {tensor: tensor for tensor in names})
    return ExportComponent(name, view, config, dtype=_cast_dtype(dtype, origin) if name == "transformer" else None)


def _transformer_with_diffusers_names(
    origin: ExportOrigin, tensors: TensorSource, request: ExportRequest
) -> ExportComponent:
    """Plan a transformer with diffusers' names but without config, as trainers built on diffusers store it in
    DeepSpeed."""
    prefix = next(name for name in tensors.tensors if "transformer_blocks." in name).partition("transformer_blocks.")[0]
    view = RenamedTensors(
        tensors, {name.removeprefix(prefix): name for name in tensors.tensors if name.startswith(prefix)}
    )
    config = dict(origin.json or {})
    if not config:
        if request.family == "auto":
            raise ConfigError(
                f"{origin.place} holds a transformer with diffusers' names; tensors show neither heads nor positions.",
                "Name its config: stage.config=[PATH of the transformer's config.json], or model=NAME.",
            )
        config = diffusers_configs.transformer_config(published_facts(request.family))
    expected = expected_shapes(meta_model(config, "the transformer's config"))
    problems = sorted(expected.keys() ^ view.tensors.keys())
    problems += [name for name, info in view.tensors.items() if expected.get(name, info.shape) != info.shape]
    if problems:
        raise ConversionError(
            f"{origin.place} does not match this config: {len(problems)} tensors are missing, extra or of another "
            f"shape, such as {problems[0]}.",
            "Check that the config is of the same model.",
        )
    ordered = RenamedTensors(view, {name: name for name in expected})
    return ExportComponent("transformer", ordered, config, dtype=_cast_dtype(request.dtype, origin))


def _cast_dtype(requested: str, origin: ExportOrigin) -> torch.dtype | None:
    """Return the dtype to cast to. auto is the dtype of training, or ``None`` (no cast) if it is unknown."""
    name = requested
    if requested == "auto":
        trained_with = origin.training.trained_with
        if trained_with is None or trained_with.dtype is None:
            return None
        name = trained_with.dtype
    if name not in DTYPES:
        raise ConfigError(f"stage.dtype={requested}: {name} is unknown.", f"Choose auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


_HINT = "The file is incomplete, or its layout is not that of this model variant. Nothing was converted."


@dataclass(frozen=True)
class MappingStep:
    """One operation and the shapes of its targets. ``dtype``: the dtype of its sources, and so of its targets."""

    operation: Operation
    out_shapes: dict[str, Shape]
    dtype: torch.dtype

    @property
    def sources(self) -> tuple[str, ...]:
        return self.operation.sources

    @property
    def targets(self) -> tuple[str, ...]:
        return self.operation.targets


@dataclass(frozen=True)
class MappingPlan:
    """``steps`` in the order of the table; ``drops``: the operations that drop a tensor of the source."""

    steps: list[MappingStep]
    drops: list[Drop]

    @property
    def dropped(self) -> list[tuple[str, str]]:
        """(source, reason) of every dropped tensor."""
        return [(drop.source, drop.reason) for drop in self.drops]

    def shapes(self) -> dict[str, Shape]:
        """Return the shape of every target."""
        return {name: shape for step in self.steps for name, shape in step.out_shapes.items()}


def make_plan(
    table: Iterable[Operation], tensors: Mapping[str, TensorInfo], expected: Mapping[str, Shape] | None = None
) -> MappingPlan:
    """Return the plan that applies ``table`` to ``tensors``.

    ``expected``: names and shapes of the tensors that the model needs; without it, the table alone decides. A tensor
    that the table drops may be absent. Raises one :class:`ConversionError` that lists every source without a use or
    with two, every target that is missing or made twice, and every shape or dtype that does not fit.
    """
    steps: list[MappingStep] = []
    drops: list[Drop] = []
    problems: list[str] = []
    usual_dtype = Counter(info.dtype for info in tensors.values()).most_common(1)[0][0] if tensors else torch.float32
    uses: Counter[str] = Counter()
    for operation in table:
        uses.update(name for name in operation.sources if name in tensors)
        if isinstance(operation, Drop):
            drops += [operation] if operation.source in tensors else []
            continue
        missing = [name for name in operation.sources if name not in tensors]
        if missing:
            needed = " and ".join(operation.targets) + (" need it" if len(operation.targets) > 1 else " needs it")
            problems += [f"{name}: missing; {needed}" for name in missing]
            continue
        try:
            steps.append(_plan_step(operation, tensors, usual_dtype))
        except ConversionError as error:
            problems.append(error.message)
    problems += [f"{name} {list(info.shape)}: no rule uses it" for name, info in tensors.items() if not uses[name]]
    problems += [f"{name}: {count} rules use it" for name, count in uses.items() if count > 1]
    if expected is not None or not problems:
        problems += _output_problems(expected, steps, bool(problems))
    if problems:
        count_text = f"{len(problems)} problem" + "s" * (len(problems) > 1)
        raise ConversionError(
            f"These tensors cannot be converted; {count_text}:\n{format_list(problems, most=60)}", _HINT
        )
    return MappingPlan(steps, drops)


def _plan_step(operation: Operation, tensors: Mapping[str, TensorInfo], usual_dtype: torch.dtype) -> MappingStep:
    dtypes = {tensors[name].dtype for name in operation.sources}
    if len(dtypes) > 1:
        each = ", ".join(f"{name} {str(tensors[name].dtype).removeprefix('torch.')}" for name in operation.sources)
        raise ConversionError(f"{' and '.join(operation.targets)}: made of tensors of different dtypes: {each}")
    shapes = {name: tuple(tensors[name].shape) for name in operation.sources}
    return MappingStep(operation, operation.out_shapes(shapes), dtypes.pop() if dtypes else usual_dtype)


def _output_problems(expected: Mapping[str, Shape] | None, steps: list[MappingStep], incomplete: bool) -> list[str]:
    """Return the targets that are made twice or do not match ``expected``.

    ``incomplete``: sources are missing; the problems that name them also explain the missing targets.
    """
    made = Counter(name for step in steps for name in step.targets)
    problems = [f"{name}: produced {count} times" for name, count in made.items() if count > 1]
    if expected is None:
        return problems
    for step in steps:
        origin = " and ".join(step.sources) or "a formula"
        for name, shape in step.out_shapes.items():
            if name not in expected:
                problems.append(f"{name} (from {origin}): the model has no such tensor")
            elif tuple(expected[name]) != shape:
                problems.append(f"{name} (from {origin}): {list(shape)}, the model has {list(expected[name])}")
    if not incomplete:
        problems += [
            f"{name} {list(shape)}: nothing produces it" for name, shape in expected.items() if name not in made
        ]
    return problems


class ConvertedTensors:
    """The targets of a plan, each made from ``source`` when it is read. Nothing is stored between two reads.

    ``restored``: values of dropped tensors by name, used instead of formulas where the shape fits. With the tensors
    that :func:`unrestored_tensors` names, the inverse conversion returns every tensor to the bit.
    """

    def __init__(
        self, plan: MappingPlan, source: TensorSource, restored: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self.plan = plan
        self.source = source
        self.restored = restored or {}
        self._steps = {name: step for step in plan.steps for name in step.targets}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(
                name,
                step.out_shapes[name],
                step.dtype,
                source.tensors[step.sources[0]].file if step.sources else Path(),
            )
            for name, step in self._steps.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Return one target in the dtype of its sources, as a view of them where the operation permits it."""
        step = self._steps[name]
        restored = self.restored.get(name)
        if not step.sources and restored is not None and tuple(restored.shape) == step.out_shapes[name]:
            return restored.to(step.dtype)
        return step.operation.make(name, {source: self.source.read(source) for source in step.sources}).to(step.dtype)


def unrestored_tensors(plan: MappingPlan) -> list[str]:
    """Return the dropped sources that no formula restores exactly."""
    return [drop.source for drop in plan.drops if drop.formula is None or not drop.formula.exact]


def computed_table_differences(plan: MappingPlan, source: TensorSource) -> dict[str, float]:
    """Return, for every dropped tensor with an exact formula, its largest difference from the formula's result."""
    found = {drop.source: drop.difference(source.read(drop.source)) for drop in plan.drops}
    return {name: value for name, value in found.items() if value is not None}
