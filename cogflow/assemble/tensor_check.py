"""Are the tensors in the files those that the config asks for? Names and shapes, from headers and the library's own classes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import diffusers

from cogflow.assemble.components import STEMS, PipelineComponent
from cogflow.errors import CogflowError, format_list
from cogflow.weights.strict_loading import expected_shapes, meta_model
from cogflow.weights.tensor_source import WeightsFolder


def tensor_problems(parts: Mapping[str, PipelineComponent]) -> list[str]:
    """What is missing, extra or of another shape in each component. ``from_pretrained`` fills a missing tensor with noise and drops an
    extra one, with a warning at most."""
    problems = []
    for name in STEMS:
        if name in parts and parts[name].files:
            try:
                problems += _compare(parts[name])
            except CogflowError as error:
                problems.append(f"{name}: {error.message}")
    return problems


def _compare(part: PipelineComponent) -> list[str]:
    config = {key: value for key, value in part.settings.items() if key not in part.unset}
    if (cls := getattr(diffusers, part.class_name, None)) is not None:
        # Settings of another version of diffusers, which this one passes over as well.
        known = inspect.signature(cls.__init__).parameters
        config = {key: value for key, value in config.items() if key in known} | {"_class_name": part.class_name}
    expected = expected_shapes(meta_model(config, part.folder, part.name))
    found = {name: info.shape for name, info in WeightsFolder(part.folder, STEMS[part.name]).tensors.items()}
    if part.name == "text_encoder" and "shared.weight" not in found and "encoder.embed_tokens.weight" in found:
        found["shared.weight"] = found["encoder.embed_tokens.weight"]  # one tensor under either name
    lines = [f"missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - found.keys())]
    if part.name != "text_encoder":  # a whole T5 holds its decoder besides
        lines += [f"extra: {name} {list(found[name])}" for name in sorted(found.keys() - expected.keys())]
    lines += [
        f"{name} is {list(found[name])}, the config asks for {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    return (
        [f"{part.name}: the tensors in {part.folder} are not those of its config:\n{format_list(lines, 6)}"]
        if lines
        else []
    )
