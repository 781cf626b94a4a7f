"""Check that a component folder holds exactly the tensors that its class in diffusers or transformers expects.

The class is built on the meta device, and weights stay mapped from their files, so the checks need no memory for
weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from cogflow.errors import ConversionError, format_list
from cogflow.files.bounded_parsing import large_values
from cogflow.files.record_io import ForeignObject
from cogflow.weights.tensor_source import STEM, WeightsFolder, read_json

CLASSES: dict[str, Any] = {"transformer": CogVideoXTransformer3DModel, "vae": AutoencoderKLCogVideoX}

STEMS = {"transformer": STEM, "vae": STEM, "text_encoder": "model"}
"""Name of a component's safetensors without suffix, in diffusers and in transformers."""


def meta_model(config: ForeignObject, where: Path | str, component: str = "transformer") -> torch.nn.Module:
    """Return the component that ``config`` describes, on the meta device. ``where`` names the config in messages.

    Raises :class:`ConversionError` if the config is not one of the component's class, or names code to run.
    """
    if problems := large_values(config):
        raise ConversionError(f"{where} describes no model that is built: {'; '.join(problems[:5])}.")
    if component == "text_encoder":
        return _meta_text_encoder(config, where)
    cls = CLASSES[component]
    name = cls.__name__
    if config.get("_class_name") != name or "auto_map" in config:
        raise ConversionError(
            f"{where} is of class {config.get('_class_name')!r}, not {name} without custom code.",
            "cogflow runs no code from a model folder.",
        )
    parameters = inspect.signature(cls).parameters
    unknown = sorted(key for key in config if not key.startswith("_") and key not in parameters)
    if unknown:
        raise ConversionError(
            f"{where} has settings that {name} does not know: {', '.join(unknown)}.", "Correct or remove them."
        )
    try:
        with init_empty_weights():
            model: torch.nn.Module = cls.from_config(
                {key: value for key, value in config.items() if key != "_name_or_path"}
            )
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError, IndexError) as error:
        raise ConversionError(f"{where} describes no {component} that can be built: {error}") from error
    return model


def _meta_text_encoder(config: ForeignObject, where: Path | str) -> torch.nn.Module:
    if config.get("model_type") != "t5" or "auto_map" in config:
        raise ConversionError(
            f"{where} is of type {config.get('model_type')!r}, not a T5 encoder without custom code.",
            "cogflow runs no code from a model folder.",
        )
    try:
        with init_empty_weights():
            model: torch.nn.Module = T5EncoderModel(
                T5Config(**{key: value for key, value in config.items() if key != "architectures"})
            )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConversionError(f"{where} describes no T5 encoder that can be built: {error}") from error
    return model


def expected_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a file must hold for ``model``, in the model's order.

    A tensor with two names is stored under the first.
    """
    tied = set(getattr(model, "_tied_weights_keys", None) or [])
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    # transformers ties the encoder's embedding to the shared one and writes only shared.weight.
    if "shared.weight" in shapes:
        shapes.pop("encoder.embed_tokens.weight", None)
    return shapes


def shape_problems(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], wanted: str
) -> list[str]:
    """Return one line for every tensor that is missing, extra or of another shape. ``wanted``: text before the right
    shape."""
    problems = [f"missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"extra: {name} {list(found[name])}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"shape: {name} is {list(found[name])}, {wanted} {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    return problems


def ordered_tensor_names(weights: WeightsFolder, model: torch.nn.Module) -> list[str]:
    """Return the names of the tensors of ``model`` in its order, after checking that ``weights`` holds exactly these.

    Raises :class:`ConversionError` listing every tensor that is missing, extra or of another shape.
    """
    expected = expected_shapes(model)
    found = {name: info.shape for name, info in weights.tensors.items()}
    if problems := shape_problems(expected, found, "its config asks for"):
        raise ConversionError(
            f"The tensors in {weights.folder} do not match its config.json:\n{format_list(problems)}",
            "Check that config and weights belong to one model and that diffusers saved both.",
        )
    return list(expected)


def check_strict_load(folder: Path, component: str = "transformer") -> None:
    """Load ``folder`` strictly into the component's class. Raises :class:`ConversionError` for anything that does not
    fit."""
    weights = WeightsFolder(folder, STEMS[component])
    model = meta_model(read_json(folder / "config.json"), folder / "config.json", component)
    names = ordered_tensor_names(weights, model)
    state = {name: weights.read(name) for name in names}
    if component == "text_encoder":
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ConversionError(f"{folder} does not load strictly: {error}") from error
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise ConversionError(f"{folder} leaves parameters without values:\n{format_list(left)}")
