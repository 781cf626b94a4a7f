"""The transformer that training starts with, and its weights, which stream in: from the pipeline folder of
``model.path``, or from whatever ``stage.start`` names (a run, a checkpoint, a SAT or DeepSpeed folder, a diffusers
folder).

The model is made without weights; then one tensor after another is read from its mapped file and copied to where
training keeps it. Under ZeRO-3 that is a share on each rank, and only rank 0 reads: no rank and no node ever holds the
model in host memory, let alone twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel

from cogflow.artifacts.identify import identify, kind_named
from cogflow.config.schema import Config, DeepSpeedConfig, TrainStage
from cogflow.errors import ConfigError, ConversionError, format_list
from cogflow.export.component import prepare
from cogflow.export.origin import open_origin
from cogflow.runtime import ranks
from cogflow.runtime.console import echo
from cogflow.runtime.progress import progress
from cogflow.training.deepspeed_start import sharded_init, whole_on_main
from cogflow.weights.strict_loading import expected_shapes, meta_model, shape_problems
from cogflow.weights.tensor_source import TensorSource, WeightsFolder, read_json

FACTS = ("scaling_factor", "snr_shift_scale", "invert_scale_latents", "prediction_type", "rescale_betas_zero_snr")
"""What the weights were trained for and the pipeline folder beside them must agree in."""


@dataclass(frozen=True)
class InitialWeights:
    """Weights by diffusers' names, and where they come from. ``facts``: the recorded facts of their training."""

    place: Path
    tensors: TensorSource
    facts: Mapping[str, Any]


def build(
    config: Config[TrainStage], source: Path, dtype: torch.dtype, device: torch.device, facts: Mapping[str, Any]
) -> Any:
    """The transformer of the pipeline folder ``source``, in ``dtype`` on ``device`` (its share of each weight under
    ZeRO-3). Collective.

    ``facts``: of the VAE and scheduler in ``source``. Raises :class:`ConversionError` for tensors that are not those of
    its config.json, and :class:`ConfigError` when ``stage.start`` was trained for other facts.
    """
    stage = config.stage
    shape_of = read_json(source / "transformer" / "config.json")
    outline = meta_model(shape_of, source / "transformer" / "config.json")
    weights = find_weights(config, source)
    _check(outline, weights)
    _agree(weights, facts)
    return make(shape_of, weights.tensors, config.deepspeed, stage, dtype, device)


def make(
    config: Mapping[str, Any],
    tensors: TensorSource,
    deepspeed: DeepSpeedConfig,
    stage: TrainStage,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """The transformer that ``config`` (a ``config.json`` of diffusers) describes, with the values of ``tensors``, which
    must be its own. Collective.
    """
    with sharded_init(deepspeed, stage, dtype), _no_random_weights():
        transformer = (
            CogVideoXTransformer3DModel.from_config(config) if deepspeed.zero_stage == 3 else _without_weights(config)
        )
    _place(transformer, config, dtype, device)
    _stream(transformer, tensors, dtype)
    return transformer


def find_weights(config: Config[TrainStage], source: Path) -> InitialWeights:
    """Return the weights that ``stage.start`` names, else those of the pipeline folder ``source``. No tensor is read.

    Raise :class:`CheckpointError` for a path without a transformer, and :class:`ConfigError` for a LoRA.
    """
    start = config.stage.start
    if start is None:
        return InitialWeights(source / "transformer", WeightsFolder(source / "transformer"), {})
    artifact = identify(Path(start), kind_named(config.stage.start_kind, "stage.start_kind"), key="stage.start")
    echo(artifact.line("stage.start"))
    origin = open_origin(artifact, ["transformer"])
    for line in (*origin.notes, *(f"passed over a broken checkpoint: {problem}" for problem in origin.passed_over)):
        echo(f"note: {line}")
    prepared = prepare(
        origin, ["transformer"], config.model.name if origin.tensors is not None else "auto", {}, "auto", False
    )
    if prepared.adapters is not None:
        raise ConfigError(
            f"stage.start={start} is a LoRA.", "Merge it first: python -m cogflow stage=export stage.lora=merge"
        )
    known = prepared.facts.trained_with() if prepared.facts is not None else origin.trainer.get("trained_with") or {}
    step = "" if origin.step is None else f" of step {origin.step}"
    echo(f"starting from {origin.place} ({origin.kind}, {origin.weights} weights{step})")
    return InitialWeights(origin.place, prepared.components[0].tensors, known)


def _check(outline: torch.nn.Module, weights: InitialWeights) -> None:
    expected, found = (
        expected_shapes(outline),
        {name: tuple(info.shape) for name, info in weights.tensors.tensors.items()},
    )
    if problems := shape_problems(expected, found, "the model's is"):
        raise ConversionError(
            f"The weights in {weights.place} are not those of the model:\n{format_list(problems)}",
            "Give the model= and model.path they belong to.",
        )


def _agree(weights: InitialWeights, facts: Mapping[str, Any]) -> None:
    different = [
        f"{key}: the weights were trained with {weights.facts[key]}, the pipeline folder says {facts[key]}"
        for key in FACTS
        if key in weights.facts and key in facts and weights.facts[key] != facts[key]
    ]
    if different:
        raise ConfigError(
            f"stage.start={weights.place} does not fit the VAE and scheduler of model.path:\n  "
            + "\n  ".join(different),
            "Train with the pipeline folder that the weights belong to: with another's, videos blur and the loss does not tell.",
        )


def _without_weights(config: Mapping[str, Any]) -> Any:
    """Parameters on the meta device; buffers, which are computed and not read, in fp32 as they are."""
    with init_empty_weights(include_buffers=False):
        return CogVideoXTransformer3DModel.from_config(config)


def _place(transformer: Any, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Memory for the weights that have none yet; buffers as they are computed in fp32, rounded once."""
    for module in transformer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                module.register_parameter(
                    name, torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
                )
    # ZeRO-3 makes every tensor of a constructor in half precision, tables of positions among them.
    computed = dict(_without_weights(config).named_buffers())
    for module_name, module in transformer.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            exact = computed[f"{module_name}.{name}" if module_name else name]
            module._buffers[name] = exact.to(device, dtype if buffer.is_floating_point() else None)


@torch.no_grad()
def _stream(transformer: Any, tensors: TensorSource, dtype: torch.dtype) -> None:
    targets = dict(transformer.named_parameters()) | dict(transformer.named_buffers())
    names = [name for name in tensors.tensors if name in targets]
    total = sum(getattr(targets[name], "ds_numel", targets[name].numel()) * dtype.itemsize for name in names)
    with progress(total, "weights", unit="bytes") as bar:
        for name in names:
            target = targets[name]
            with whole_on_main(target):
                # Where every rank has the whole tensor, every rank reads it; else rank 0 reads it for all.
                if not hasattr(target, "ds_id") or ranks.is_main():
                    target.copy_(tensors.read(name))
            bar.advance(getattr(target, "ds_numel", target.numel()) * dtype.itemsize)


@contextlib.contextmanager
def _no_random_weights() -> Iterator[None]:
    """Layers keep what memory held: 5.6 billion random numbers would be drawn only to be written over."""
    kinds = (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Conv2d, torch.nn.Embedding)
    kept = {kind: kind.reset_parameters for kind in kinds}
    try:
        for kind in kinds:
            kind.reset_parameters = lambda self: None
        yield
    finally:
        for kind, method in kept.items():
            kind.reset_parameters = method
