"""What diffusers' own transformer class expects, and whether a folder's tensors are exactly that. Costs no weight memory."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel

from cogflow.errors import ConversionError
from cogflow.weights.reader import WeightsFolder, listed, read_json

CLASS = "CogVideoXTransformer3DModel"


def skeleton(config: dict[str, Any], where: Path) -> CogVideoXTransformer3DModel:
    """The transformer of ``config`` on the meta device. Raises :class:`ConversionError` for a config that is not one of it."""
    if config.get("_class_name") != CLASS or "auto_map" in config:
        raise ConversionError(
            f"{where} is of class {config.get('_class_name')!r}, and not plainly of {CLASS}.", "cogflow runs no code from a model folder."
        )
    unknown = sorted(
        key for key in config if not key.startswith("_") and key not in inspect.signature(CogVideoXTransformer3DModel).parameters
    )
    if unknown:
        raise ConversionError(f"{where} has settings that {CLASS} does not know: {', '.join(unknown)}.", "Correct or remove them.")
    try:
        with init_empty_weights():
            return CogVideoXTransformer3DModel.from_config({key: value for key, value in config.items() if key != "_name_or_path"})
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError, IndexError) as error:
        raise ConversionError(f"{where} describes no transformer that can be built: {error}") from error


def check_tensors(weights: WeightsFolder, model: CogVideoXTransformer3DModel) -> list[str]:
    """The names of ``model``'s tensors in its order, when ``weights`` holds exactly these in these shapes.

    Raises :class:`ConversionError` listing every tensor that is missing, extra or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: info.shape for name, info in weights.tensors.items()}
    problems = [f"missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"extra: {name} {list(found[name])}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"shape: {name} is {list(found[name])}, its config asks for {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        raise ConversionError(
            f"The tensors in {weights.folder} are not those of its config.json:\n{listed(problems)}",
            "Is the config another model's, or was the checkpoint saved by another program?",
        )
    return list(expected)


def load_check(folder: Path) -> None:
    """Load ``folder`` strictly into the class it names. The tensors stay mapped from their files.

    Raises :class:`ConversionError` for anything that does not fit.
    """
    weights = WeightsFolder(folder)
    model = skeleton(read_json(folder / "config.json"), folder / "config.json")
    names = check_tensors(weights, model)
    try:
        model.load_state_dict({name: weights.read(name) for name in names}, strict=True, assign=True)
    except RuntimeError as error:
        raise ConversionError(f"{folder} does not load strictly: {error}") from error
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise ConversionError(f"{folder} leaves parameters without values:\n{listed(left)}")
