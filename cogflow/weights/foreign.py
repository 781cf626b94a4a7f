"""Read checkpoints that other programs wrote: SAT's folders and files, its VAE, and DeepSpeed checkpoints.

SAT and DeepSpeed write the same files: a folder with ``latest``, and one folder per step with
``mp_rank_00_model_states.pt``. The names of the tensors tell them apart (:func:`layout_of`).
:mod:`cogflow.artifacts.identify` decides which reader a path needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from cogflow.errors import CheckpointError, format_list
from cogflow.weights.model_parallel import PART_FILE, check_part_count, join_parts, part_files
from cogflow.weights.tensor_source import TensorInfo, TensorSource
from cogflow.weights.torch_file import TorchFile
from cogflow.weights.zero import ZeroCheckpoint
from cogflow.weights.zero_files import SHARDED_MODEL, has_optimizer_states, read_state_file

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
EMA_SUFFIX = "-ema"
"""SAT saves the moving average of step 500 in a folder ``500-ema`` beside ``500``."""
SIZES = "model_config.json"
SAT_PREFIXES = (
    "model.diffusion_model.",
    "conditioner.",
    "first_stage_model.",
    "mixins.",
    "transformer.layers.",
    "time_embed.",
)
VAE_PREFIXES = ("encoder.down.", "encoder.mid.block_", "decoder.up.", "decoder.mid.block_")
DIFFUSERS_WORDS = ("transformer_blocks.", "encoder.down_blocks.", "decoder.up_blocks.")

Layout = Literal["sat", "vae", "zero"]


@dataclass(frozen=True)
class ForeignWeights:
    """Weights of another program, opened but not read.

    ``layout``: ``sat``; ``vae`` (SAT's VAE, names without prefix); ``zero`` (a DeepSpeed checkpoint of diffusers'
    names). ``origin``: the folder or file that was opened. ``files``: those that hold tensors. ``weights``: model or
    ema. ``yamls``: training_config.yaml, model_config.json (JSON is YAML) and configs/*.yaml beside ``origin`` and one
    level up, the nearest first. ``metadata``: small plain values that the files hold beside the weights. ``notes``:
    choices that the reader made, for the user.
    """

    layout: Layout
    tensors: TensorSource
    origin: Path
    files: list[Path]
    step: int | None
    weights: str
    yamls: list[Path]
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_step_folder(folder: Path, weights: str, masters: str, notes: Iterable[str] = ()) -> ForeignWeights:
    """Open a step folder of SAT or DeepSpeed: one that holds ``mp_rank_00_model_states.pt``, or ZeRO-3's sharded model
    states.

    ``weights``: auto (the model), model, or ema (SAT's ``<step>-ema`` beside it). ``masters``: ``fp32``, the master
    weights in ZeRO's optimizer states; ``bf16``, the weights as stored, whatever their dtype; auto: fp32 for
    DeepSpeed's own folders that hold master weights, as stored for all others.

    Raise :class:`CheckpointError` for files that are missing, broken or of unknown tensors, :class:`ConversionError`
    for model-parallel parts that cannot be joined.
    """
    said = list(notes)
    folder, weights = _model_or_ema(folder, weights, said)
    if not is_step_folder(folder):
        raise no_states(folder)
    with_masters = has_optimizer_states(folder)
    if weights == "ema" and masters == "fp32" and with_masters:
        raise CheckpointError(
            f"{folder} keeps its average only as stored: the fp32 master weights beside it are those of the model.",
            "Use masters=auto with weights=ema, or weights=model.",
        )
    parts = part_files(folder)
    sharded = sorted({int(match[2]) for path in folder.iterdir() if (match := SHARDED_MODEL.fullmatch(path.name))})
    opened = _open_parts(folder, weights, masters, parts, sharded, with_masters)
    zeros = [one for one in opened if isinstance(one, ZeroCheckpoint)]
    if with_masters and not zeros:
        said.append("The weights are taken as stored; fp32 master weights lie beside them (masters=fp32).")
    files: list[Path] = []
    for one in opened:
        files += one.files if isinstance(one, ZeroCheckpoint) else [one.path]
        said += one.notes if isinstance(one, ZeroCheckpoint) else []
    metadata = next((dict(one.metadata) for one in opened if one.metadata), {})
    tensors = join_parts(opened)
    if len(opened) > 1:
        said.append(f"{len(opened)} model-parallel parts are joined.")
    if masters == "fp32" and not zeros:
        _refuse_low_precision(folder, tensors.tensors)
    layout = layout_of(tensors.tensors)
    if layout is None:
        raise unknown_names(folder, tensors.tensors)
    step = step_in(metadata, folder.name)
    return ForeignWeights(layout, tensors, folder, files, step, weights, _yamls(folder), metadata, said)


def read_torch_file(path: Path, weights: str, masters: str, notes: Iterable[str] = ()) -> ForeignWeights:
    """Open a single ``.pt`` file of SAT, or SAT's VAE. For the arguments and errors see :func:`read_step_folder`."""
    in_step_folder = PART_FILE.fullmatch(path.name) is not None
    ema = in_step_folder and path.parent.name.endswith(EMA_SUFFIX)
    if weights == ("model" if ema else "ema"):
        raise CheckpointError(
            f"{path} is of weights={'ema' if ema else 'model'}.", "Give the folder that holds both, or the other file."
        )
    file = TorchFile(path)
    check_part_count(file, 1)
    if in_step_folder and (parts := len(part_files(path.parent))) > 1:
        raise CheckpointError(f"{path} is one of {parts} model-parallel parts.", f"Give the folder: {path.parent}")
    if masters == "fp32":
        _refuse_low_precision(path, file.tensors)
    layout = layout_of(file.tensors)
    if layout is None or layout == "zero":
        raise unknown_names(path, file.tensors)
    wrapped = [] if file.wrapper == "none" else [f"The weights lie under {file.wrapper} in {path.name}."]
    return ForeignWeights(
        layout=layout,
        tensors=file,
        origin=path,
        files=[path],
        step=step_in(file.metadata, path.parent.name if in_step_folder else ""),
        weights="ema" if ema else "model",
        yamls=_yamls(path.parent),
        metadata=dict(file.metadata),
        notes=[*notes, *wrapped],
    )


def is_step_folder(folder: Path) -> bool:
    """Return whether a folder holds model states as SAT and DeepSpeed name them."""
    return any(is_model_states(path.name) for path in folder.iterdir())


def is_model_states(name: str) -> bool:
    """Return whether a file name is that of SAT's and DeepSpeed's model states."""
    return PART_FILE.fullmatch(name) is not None or SHARDED_MODEL.fullmatch(name) is not None


def tensor_names(folder: Path) -> list[str]:
    """Return the tensor names in a step folder, from the model states of its first part; no tensor is read."""
    names = sorted(path.name for path in folder.iterdir() if is_model_states(path.name))
    if PART_FILE.fullmatch(names[0]) and not has_optimizer_states(folder):
        return list(TorchFile(folder / names[0]).tensors)
    states = read_state_file(folder / names[0])
    shapes = states.get("param_shapes")
    groups = shapes if isinstance(shapes, (list, tuple)) else []
    found = [str(name) for group in [*groups, states.get("module")] if isinstance(group, Mapping) for name in group]
    return [name.removeprefix("module.") for name in found]


def layout_of(names: Iterable[str]) -> Layout | None:
    """Return whose tensor names these are; ``None`` for names that cogflow does not know."""
    known = list(names)
    if any(name.startswith(SAT_PREFIXES) for name in known):
        return "sat"
    if any(name.startswith(VAE_PREFIXES) for name in known):
        return "vae"
    return "zero" if any(word in name for name in known for word in DIFFUSERS_WORDS) else None


def step_in(metadata: Mapping[str, Any], name: str) -> int | None:
    """Return the step that the file states, else the number in its folder's ``name``.

    SAT counts in ``iteration`` and may leave ``global_steps`` at 0.
    """
    for key in ("iteration", "global_steps"):
        value = metadata.get(key)
        if isinstance(value, int) and value > 0:
            return value
    match = re.fullmatch(rf"(?:global_step)?(\d+)(?:{EMA_SUFFIX})?", name)
    return int(match[1]) if match else None


def no_states(folder: Path) -> CheckpointError:
    """Return the error for a step folder without model states."""
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    return CheckpointError(
        f"{folder} holds no mp_rank_00_model_states.pt. It holds {names or 'nothing'}.",
        "Copy every file of the checkpoint, or give the folder of another step.",
    )


def unknown_names(place: Path, tensors: Mapping[str, TensorInfo]) -> CheckpointError:
    """Return the error for weights whose names are not those of SAT; it shows some of the names."""
    lines = [f"{name} {tuple(info.shape)}" for name, info in tensors.items()]
    if layout_of(tensors) == "zero":
        whose = "of diffusers, not of SAT"
        hint = "diffusers' weights are read from a folder with config.json and safetensors (save_pretrained)."
    else:
        whose = "of no layout that cogflow knows"
        hint = f"Expected are names that begin with {', '.join(SAT_PREFIXES[:4])} (SAT) or encoder.down. (its VAE)."
    return CheckpointError(f"{place} holds weights, but {whose}. Its tensors are named:\n{format_list(lines, 6)}", hint)


def _open_parts(
    folder: Path, weights: str, masters: str, parts: list[Path], sharded: list[int], with_masters: bool
) -> list[ZeroCheckpoint | TorchFile]:
    """Open every model-parallel part of a step folder, as master weights or as stored."""
    deepspeed_folder = (
        re.fullmatch(rf"\d+({EMA_SUFFIX})?|release", folder.name) is None
    )  # SAT names a folder by a number
    prefers_masters = masters == "auto" and with_masters and weights == "model" and (deepspeed_folder or bool(sharded))
    if (masters == "fp32" or prefers_masters) and (with_masters or sharded):
        return [ZeroCheckpoint(folder, "fp32", part) for part in sharded or range(len(parts))]
    if sharded:
        return [ZeroCheckpoint(folder, "bf16", part) for part in sharded]
    files = [TorchFile(path) for path in parts]
    for file in files:
        check_part_count(file, len(parts))
    return list(files)


def _model_or_ema(folder: Path, weights: str, notes: list[str]) -> tuple[Path, str]:
    """Return the step folder or the ``-ema`` folder beside it, as asked for, and which of them it is."""
    given = "ema" if folder.name.endswith(EMA_SUFFIX) else "model"
    name = folder.name.removesuffix(EMA_SUFFIX)
    other = folder.with_name(name if given == "ema" else name + EMA_SUFFIX)
    if weights in ("auto", given):
        if weights == "auto" and given == "model" and other.is_dir():
            notes.append(
                f"The model's weights are taken; their average lies beside them, in {other.name} (weights=ema)."
            )
        return folder, given
    if not other.is_dir():
        raise CheckpointError(
            f"{folder} is of weights={given}; {other.name} is not beside it.",
            f"Use weights={given}, or copy {other.name}.",
        )
    return other, weights


def _refuse_low_precision(place: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise :class:`CheckpointError` when any tensor is in less than fp32."""
    low = [
        info
        for info in tensors.values()
        if info.dtype.is_floating_point and info.dtype not in (torch.float32, torch.float64)
    ]
    if low:
        raise CheckpointError(
            f"{place} holds no fp32 master weights: {low[0].name} is in {str(low[0].dtype).removeprefix('torch.')}.",
            "Use masters=auto to take the weights as stored.",
        )


def _yamls(folder: Path) -> list[Path]:
    """Return the settings files of a training, in its folder and one level up."""
    found: list[Path] = []
    for place in (folder, folder.parent):
        found += [path for path in (place / "training_config.yaml", place / SIZES) if path.is_file()]
        found += sorted(path for path in (place / "configs").glob("*.y*ml") if path.is_file())
    return found
