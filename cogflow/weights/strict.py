"""What the library's own class expects of a component folder, and whether its tensors are exactly that. Costs no weight memory."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from cogflow.errors import ConversionError
from cogflow.weights.reader import STEM, WeightsFolder, listed, read_json

CLASSES: dict[str, Any] = {"transformer": CogVideoXTransformer3DModel, "vae": AutoencoderKLCogVideoX}
STEMS = {"transformer": STEM, "vae": STEM, "text_encoder": "model"}
"""Component -> how its safetensors are called, in diffusers and in transformers."""


def skeleton(config: Mapping[str, Any], where: Path | str, component: str = "transformer") -> torch.nn.Module:
    """The component of ``config`` on the meta device. Raises :class:`ConversionError` for a config that is not one of its class."""
    if component == "text_encoder":
        return _text_encoder(config, where)
    wanted = CLASSES[component]
    name = wanted.__name__
    if config.get("_class_name") != name or "auto_map" in config:
        raise ConversionError(
            f"{where} is of class {config.get('_class_name')!r}, and not plainly of {name}.",
            "cogflow runs no code from a model folder.",
        )
    unknown = sorted(
        key for key in config if not key.startswith("_") and key not in inspect.signature(wanted).parameters
    )
    if unknown:
        raise ConversionError(
            f"{where} has settings that {name} does not know: {', '.join(unknown)}.", "Correct or remove them."
        )
    try:
        with init_empty_weights():
            model: torch.nn.Module = wanted.from_config(
                {key: value for key, value in config.items() if key != "_name_or_path"}
            )
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError, IndexError) as error:
        raise ConversionError(f"{where} describes no {component} that can be built: {error}") from error
    return model


def _text_encoder(config: Mapping[str, Any], where: Path | str) -> torch.nn.Module:
    if config.get("model_type") != "t5" or "auto_map" in config:
        raise ConversionError(f"{where} is of type {config.get('model_type')!r}, and not plainly a T5 encoder.")
    try:
        with init_empty_weights():
            return T5EncoderModel(T5Config(**{key: value for key, value in config.items() if key != "architectures"}))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConversionError(f"{where} describes no T5 encoder that can be built: {error}") from error


def expected_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a file must hold for ``model``, in the model's order. A tensor with two names is kept under the first."""
    tied = set(getattr(model, "_tied_weights_keys", None) or [])
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    # transformers ties the encoder's embedding to the shared one; only `shared.weight` is written.
    if "shared.weight" in shapes:
        shapes.pop("encoder.embed_tokens.weight", None)
    return shapes


def differences(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], wanted: str
) -> list[str]:
    """What of the shapes ``found`` is not as ``expected``, one line each; ``wanted``: words before the shape that it should be."""
    problems = [f"missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"extra: {name} {list(found[name])}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"shape: {name} is {list(found[name])}, {wanted} {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    return problems


def check_tensors(weights: WeightsFolder, model: torch.nn.Module) -> list[str]:
    """The names of ``model``'s tensors in its order, when ``weights`` holds exactly these in these shapes.

    Raises :class:`ConversionError` listing every tensor that is missing, extra or of another shape.
    """
    expected = expected_shapes(model)
    found = {name: info.shape for name, info in weights.tensors.items()}
    if problems := differences(expected, found, "its config asks for"):
        raise ConversionError(
            f"The tensors in {weights.folder} are not those of its config.json:\n{listed(problems)}",
            "Is the config another model's, or was the checkpoint saved by another program?",
        )
    return list(expected)


def load_check(folder: Path, component: str = "transformer") -> None:
    """Load ``folder`` strictly into the class of the component. The tensors stay mapped from their files.

    Raises :class:`ConversionError` for anything that does not fit.
    """
    weights = WeightsFolder(folder, STEMS[component])
    model = skeleton(read_json(folder / "config.json"), folder / "config.json", component)
    names = check_tensors(weights, model)
    state = {name: weights.read(name) for name in names}
    if component == "text_encoder":
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ConversionError(f"{folder} does not load strictly: {error}") from error
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise ConversionError(f"{folder} leaves parameters without values:\n{listed(left)}")
