"""The transformer that training starts with.

Its weights stream in from the pipeline folder of ``model.path``, or from what ``stage.start`` names: a run, a
checkpoint, a SAT, DeepSpeed or diffusers folder.

The model is built without weights; then one tensor after another is read from its mapped file and copied to where
training keeps it. Under ZeRO-3 that is a shard on each rank, and only rank 0 reads: no rank and no machine ever holds
the whole model in host memory.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel

from cogflow.artifacts.identify import identify, kind_named
from cogflow.config.command import command
from cogflow.config.config import Config
from cogflow.config.deepspeed_section import DeepSpeedConfig
from cogflow.config.problems import did_you_mean, nearest
from cogflow.config.train_settings import TrainStage
from cogflow.errors import ConfigError, ConversionError, format_list
from cogflow.export.export_plan import ExportRequest, prepare_export
from cogflow.export.origin import open_origin
from cogflow.files.record_io import ForeignObject
from cogflow.records.training_records import TrainedWith
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.runtime.progress import progress
from cogflow.training.deepspeed_start import sharded_init, whole_on_main
from cogflow.weights.strict_loading import expected_shapes, meta_model, shape_problems
from cogflow.weights.tensor_source import TensorSource, WeightsFolder, read_json

COMPARED_FACTS = (
    "scaling_factor",
    "snr_shift_scale",
    "invert_scale_latents",
    "prediction_type",
    "rescale_betas_zero_snr",
)
"""Facts in which the training of the weights and the pipeline folder must agree."""


@dataclass(frozen=True)
class InitialWeights:
    """Weights by diffusers' names. ``origin``: where they are; ``trained_with``: what is known of their training."""

    origin: Path
    tensors: TensorSource
    trained_with: TrainedWith = TrainedWith()


def build(
    config: Config[TrainStage], source: Path, dtype: torch.dtype, device: torch.device, facts: TrainedWith
) -> Any:
    """Return the transformer of the pipeline folder ``source``, in ``dtype`` on ``device`` (sharded under ZeRO-3).

    Collective.

    ``facts``: of the VAE and scheduler in ``source``. Raises :class:`ConversionError` for tensors that do not fit its
    config.json, and :class:`ConfigError` when ``stage.start`` was trained for other facts.
    """
    path = source / "transformer" / "config.json"
    transformer_config = read_json(path)
    weights = find_weights(config, source)
    _check_shapes(meta_model(transformer_config, path), weights)
    _check_facts(weights, facts)
    return make(transformer_config, weights.tensors, config.deepspeed, config.stage, dtype, device)


def make(
    config: ForeignObject,
    tensors: TensorSource,
    deepspeed: DeepSpeedConfig,
    stage: TrainStage,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Return the transformer of ``config`` (a ``config.json`` of diffusers) with the values of ``tensors``, which must
    fit it. Collective.
    """
    with sharded_init(deepspeed, stage, dtype), _no_random_weights():
        transformer = (
            CogVideoXTransformer3DModel.from_config(config) if deepspeed.zero_stage == 3 else _without_weights(config)
        )
    _allocate(transformer, config, dtype, device)
    _stream_weights(transformer, tensors, dtype)
    return transformer


def find_weights(config: Config[TrainStage], source: Path) -> InitialWeights:
    """Return the weights that ``stage.start`` names, or those of ``source``; found and checked, not read."""
    start = config.stage.start
    if start is None:
        return InitialWeights(source / "transformer", WeightsFolder(source / "transformer"))
    artifact = identify(Path(start), kind_named(config.stage.start_kind, "stage.start_kind"), key="stage.start")
    echo(artifact.line("stage.start"))
    origin = open_origin(artifact, ["transformer"])
    for line in (*origin.notes, *(f"skipped a broken checkpoint: {problem}" for problem in origin.passed_over)):
        echo(f"note: {line}")
    family = config.model.name if origin.tensors is not None else "auto"
    prepared = prepare_export(origin, ExportRequest(["transformer"], family))
    if prepared.lora_file is not None:
        raise ConfigError(
            f"stage.start={start} is a LoRA.",
            f"Merge it first: {command('export', {'stage.source': start, 'stage.lora': 'merge'})}",
        )
    trained_with = prepared.facts.trained_with() if prepared.facts else origin.training.trained_with
    step = "" if origin.step is None else f" of step {origin.step}"
    echo(f"starting from {origin.place} ({origin.kind}, {origin.weights} weights{step})")
    return InitialWeights(origin.place, prepared.components[0].tensors, trained_with or TrainedWith())


def freeze(transformer: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Exclude from training the parameters whose names match one of ``patterns`` (as file names match).

    Raises :class:`ConfigError` for a pattern that matches nothing, or when nothing is left to train.
    """
    names = [name for name, _ in transformer.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            tops = sorted({name.split(".")[0] for name in names})
            raise ConfigError(
                f"stage.freeze: {pattern} matches no weight.{did_you_mean(nearest(pattern, names))}",
                f"Names begin with {', '.join(tops)}; patterns are such as patch_embed.* or transformer_blocks.0.*",
            )
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    if not any(parameter.requires_grad for parameter in transformer.parameters()):
        raise ConfigError(f"stage.freeze={list(patterns)} freezes every weight.", "Leave something to train.")


def _check_shapes(model: torch.nn.Module, weights: InitialWeights) -> None:
    found = {name: tuple(info.shape) for name, info in weights.tensors.tensors.items()}
    if problems := shape_problems(expected_shapes(model), found, "the model's is"):
        raise ConversionError(
            f"The weights in {weights.origin} are not those of the model:\n{format_list(problems)}",
            "Give the model= and model.path they belong to.",
        )


def _check_facts(weights: InitialWeights, facts: TrainedWith) -> None:
    own, other = weights.trained_with.known(), facts.known()
    different = [
        f"{key}: the weights were trained with {own[key]}, the pipeline folder has {other[key]}"
        for key in COMPARED_FACTS
        if key in own and key in other and own[key] != other[key]
    ]
    if different:
        raise ConfigError(
            f"stage.start={weights.origin} does not fit the VAE and scheduler of model.path:\n  "
            + "\n  ".join(different),
            "Train with the pipeline folder that the weights belong to: with another's, videos blur and the loss does "
            "not show it.",
        )


def _without_weights(config: ForeignObject) -> Any:
    """Return a model with parameters on the meta device; buffers, which are computed and not read, are fp32."""
    with init_empty_weights(include_buffers=False):
        return CogVideoXTransformer3DModel.from_config(config)


def _allocate(transformer: Any, config: ForeignObject, dtype: torch.dtype, device: torch.device) -> None:
    """Allocate the weights that have no memory yet, and set the buffers to their values in fp32, rounded once."""
    for module in transformer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                module.register_parameter(
                    name, torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
                )
    # ZeRO-3 creates every tensor of a constructor in half precision, tables of positions among them.
    computed = dict(_without_weights(config).named_buffers())
    for module_name, module in transformer.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            exact = computed[f"{module_name}.{name}" if module_name else name]
            module._buffers[name] = exact.to(device, dtype if buffer.is_floating_point() else None)


@torch.no_grad()
def _stream_weights(transformer: Any, tensors: TensorSource, dtype: torch.dtype) -> None:
    """Copy ``tensors`` into the transformer, one at a time."""
    targets = dict(transformer.named_parameters()) | dict(transformer.named_buffers())
    names = [name for name in tensors.tensors if name in targets]
    total = sum(getattr(targets[name], "ds_numel", targets[name].numel()) * dtype.itemsize for name in names)
    with progress(total, "weights", unit="bytes") as bar:
        for name in names:
            target = targets[name]
            with whole_on_main(target):
                # Every rank that keeps the whole tensor reads it; of a sharded tensor only rank 0 does.
                if not hasattr(target, "ds_id") or ranks.is_main():
                    target.copy_(tensors.read(name))
            bar.advance(getattr(target, "ds_numel", target.numel()) * dtype.itemsize)


@contextlib.contextmanager
def _no_random_weights() -> Iterator[None]:
    """Skip the initialisation of layers, which would draw 5.6 billion random numbers that are overwritten."""
    layers = (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Conv2d, torch.nn.Embedding)
    methods = {layer: layer.reset_parameters for layer in layers}
    try:
        for layer in layers:
            layer.reset_parameters = lambda self: None  # type: ignore[method-assign]
        yield
    finally:
        for layer, method in methods.items():
            layer.reset_parameters = method  # type: ignore[method-assign]
