"""Hold a table against the tensors that are there: every source gets one outcome, every target one origin, or nothing is converted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cogflow.errors import ConversionError, format_list
from cogflow.export.algebra import Operation, Shape
from cogflow.export.recomputed_tensors import Drop
from cogflow.weights.tensor_source import TensorInfo, TensorSource

_HINT = "The layout differs from what the table of this variant says, or the file is incomplete; nothing was converted."


@dataclass(frozen=True)
class MappingStep:
    """One operation with the shapes it was planned for. ``dtype`` is that of its sources, for all its targets."""

    operation: Operation
    in_shapes: dict[str, Shape]
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
    """``steps`` in the order of the table; ``dropped``: (source, reason) of what has no target; ``drops`` the operations behind it."""

    steps: list[MappingStep]
    dropped: list[tuple[str, str]]
    drops: list[Drop]

    def shapes(self) -> dict[str, Shape]:
        """Of every target."""
        return {name: shape for step in self.steps for name, shape in step.out_shapes.items()}


def make_plan(
    table: Iterable[Operation], tensors: Mapping[str, TensorInfo], expected: Mapping[str, Shape] | None = None
) -> MappingPlan:
    """What a table does to these tensors.

    ``expected``: names and shapes of the model that is to be loaded; without it only the table says what must be there. A dropped
    tensor may be absent. Raises one :class:`ConversionError` that lists every source without an outcome or with two, every target
    not produced or produced twice, and every shape or dtype that does not fit.
    """
    steps: list[MappingStep] = []
    drops: list[Drop] = []
    problems: list[str] = []
    usual = Counter(info.dtype for info in tensors.values()).most_common(1)[0][0] if tensors else torch.float32
    taken: Counter[str] = Counter()
    for operation in table:
        taken.update(name for name in operation.sources if name in tensors)
        if isinstance(operation, Drop):
            drops += [operation] if operation.source in tensors else []
            continue
        missing = [name for name in operation.sources if name not in tensors]
        if missing:
            need = " and ".join(operation.targets) + (" need it" if len(operation.targets) > 1 else " needs it")
            problems += [f"{name}: missing; {need}" for name in missing]
            continue
        try:
            steps.append(_step(operation, tensors, usual))
        except ConversionError as error:
            problems.append(error.message)
    problems += [
        f"{name} {_shape(tensors[name].shape)}: no rule says what becomes of it" for name in tensors if not taken[name]
    ]
    problems += [f"{name}: {count} rules claim it" for name, count in taken.items() if count > 1]
    if expected is not None or not problems:
        problems += _against(expected, steps, bool(problems))
    if problems:
        count = f"{len(problems)} problem" + "s" * (len(problems) > 1)
        raise ConversionError(f"These tensors cannot be converted; {count}:\n{format_list(problems, most=60)}", _HINT)
    return MappingPlan(steps, [(drop.source, drop.reason) for drop in drops], drops)


def _step(operation: Operation, tensors: Mapping[str, TensorInfo], usual: torch.dtype) -> MappingStep:
    shapes = {name: tuple(tensors[name].shape) for name in operation.sources}
    dtypes = {tensors[name].dtype for name in operation.sources}
    if len(dtypes) > 1:
        each = ", ".join(f"{name} {str(tensors[name].dtype).removeprefix('torch.')}" for name in operation.sources)
        raise ConversionError(f"{' and '.join(operation.targets)}: made of tensors of different dtypes: {each}")
    return MappingStep(operation, shapes, operation.out_shapes(shapes), dtypes.pop() if dtypes else usual)


def _against(expected: Mapping[str, Shape] | None, steps: list[MappingStep], incomplete: bool) -> list[str]:
    made = Counter(name for step in steps for name in step.targets)
    problems = [f"{name}: produced {count} times" for name, count in made.items() if count > 1]
    if expected is None:
        return problems
    for step in steps:
        origin = " and ".join(step.sources) or "computed"
        for name, shape in step.out_shapes.items():
            if name not in expected:
                problems.append(f"{name} (from {origin}): the model has no such tensor")
            elif tuple(expected[name]) != shape:
                problems.append(f"{name} (from {origin}): {_shape(shape)}, the model has {_shape(expected[name])}")
    if not incomplete:  # otherwise the missing sources above already say why
        problems += [
            f"{name} {_shape(shape)}: nothing produces it" for name, shape in expected.items() if name not in made
        ]
    return problems


def _shape(shape: Iterable[int]) -> str:
    return str(list(shape))


class Converted:
    """The targets of a plan, each read from ``source`` when it is asked for. Nothing is kept between two reads.

    ``kept``: what was dropped on the way here (:func:`unrestored`), by name. With it the way back gives every tensor to the bit;
    without it, or for other shapes, recipes stand in.
    """

    def __init__(self, plan: MappingPlan, source: TensorSource, kept: Mapping[str, torch.Tensor] | None = None) -> None:
        self.plan, self.source, self.kept = plan, source, kept or {}
        self._steps = {name: step for step in plan.steps for name in step.targets}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, step.out_shapes[name], step.dtype, _file(step, source))
            for name, step in self._steps.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """One target in the dtype of its sources; a view of them where the operation permits it."""
        step = self._steps[name]
        if not step.sources and name in self.kept and tuple(self.kept[name].shape) == step.out_shapes[name]:
            return self.kept[name].to(step.dtype)
        return step.operation.make(name, {source: self.source.read(source) for source in step.sources}).to(step.dtype)


def _file(step: MappingStep, source: TensorSource) -> Path:
    return source.tensors[step.sources[0]].file if step.sources else Path()


def unrestored(plan: MappingPlan) -> list[str]:
    """Dropped sources that no recipe gives back as they were: worth keeping beside a conversion that is to be undone to the bit."""
    return [drop.source for drop in plan.drops if drop.recipe is None or not drop.recipe.exact]


def differences(plan: MappingPlan, source: TensorSource) -> dict[str, float]:
    """For every dropped tensor that the other side computes: how far its values are from that, at most (:meth:`Drop.difference`)."""
    found = {drop.source: drop.difference(source.read(drop.source)) for drop in plan.drops}
    return {name: value for name, value in found.items() if value is not None}
