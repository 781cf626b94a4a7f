"""Match a table of operations with the tensors that are present, and read the converted tensors.

Every source must have one use and every target one origin; otherwise nothing is converted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cogflow.errors import ConversionError, format_list
from cogflow.export.computed_tensors import Drop
from cogflow.export.tensor_operations import Operation, Shape
from cogflow.weights.tensor_source import TensorInfo, TensorSource

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
