"""Find the weights in what people have: SAT's folders and files, DeepSpeed's checkpoints, diffusers' folders.

Runs and checkpoints of cogflow itself are found by :mod:`cogflow.weights.source`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cogflow.errors import CheckpointError, ConfigError, format_list
from cogflow.weights.model_parallel import PART_FILE, check_part_count, join_parts, part_files
from cogflow.weights.tensor_source import STEM, TensorInfo, TensorSource, WeightsFolder, read_json
from cogflow.weights.torch_file import TorchFile
from cogflow.weights.zero import ZeroCheckpoint
from cogflow.weights.zero_files import SHARDED_MODEL, has_optimizer_states, latest_step_folder

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
EMA = "-ema"
SIZES = "model_config.json"
SAT_HEADS = (
    "model.diffusion_model.",
    "conditioner.",
    "first_stage_model.",
    "mixins.",
    "transformer.layers.",
    "time_embed.",
)
VAE_HEADS = ("encoder.down.", "encoder.mid.block_", "decoder.up.", "decoder.mid.block_")
DIFFUSERS_WORDS = ("transformer_blocks.", "encoder.down_blocks.", "decoder.up_blocks.")

_EXPECTED = (
    "Expected is one of: a SAT folder (with latest), its <iteration> folder or a .pt of SAT's names; a 3d-vae.pt; a DeepSpeed folder; "
    "a diffusers folder (config.json and safetensors); a run or checkpoint of cogflow."
)


@dataclass(frozen=True)
class Found:
    """Weights and what lies beside them.

    ``kind``: by the names of the tensors ``sat``, or ``vae`` (SAT's, without prefix); ``zero`` (a DeepSpeed checkpoint of diffusers'
    names); ``diffusers``. ``origin``: the folder or file read. ``files``: those holding tensors. ``weights``: model or ema. ``yamls``:
    training_config.yaml, model_config.json (json is yaml, too) and configs/*.yaml beside ``origin`` and one level up, the nearest
    first. ``metadata``: what the files say of themselves; ``config`` is diffusers' config.json. ``notes``: choices made, for people.
    """

    kind: str
    tensors: TensorSource
    origin: Path
    files: list[Path]
    step: int | None
    weights: str
    yamls: list[Path]
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find(place: Path, weights: str = "auto", masters: str = "auto") -> Found:
    """The weights at ``place``.

    ``weights``: auto (model), model or ema (SAT's ``<iteration>-ema``). ``masters``: ``fp32``, DeepSpeed's master weights; ``bf16``, the
    weights as stored, whatever their dtype; auto: fp32 for DeepSpeed's own folders that hold them, as stored for all else.

    Raises :class:`CheckpointError` for what is missing, broken or of no known kind, :class:`ConfigError` for unknown words,
    :class:`ConversionError` for model-parallel parts that cannot be joined.
    """
    for key, value, known in (
        ("weights", weights, ("auto", "model", "ema")),
        ("masters", masters, ("auto", "fp32", "bf16")),
    ):
        if value not in known:
            raise ConfigError(f"{key}={value} is unknown.", f"Choose {', '.join(known[:-1])} or {known[-1]}.")
    place = Path(place).expanduser()
    if not place.exists():
        raise CheckpointError(f"{place} does not exist.", _EXPECTED)
    if place.is_file():
        return _file(place, weights, masters, [])
    if (place / "latest").is_file():
        return _step_folder(latest_step_folder(place), weights, masters, [])
    if _is_step(place):
        return _step_folder(place, weights, masters, [])
    if (place / "transformer" / "latest").is_file():  # CogVideoX's published SAT weights lie like this
        note = f"{place} holds several components; its transformer is taken."
        return _step_folder(latest_step_folder(place / "transformer"), weights, masters, [note])
    for folder in (place, place / "transformer"):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors*")):
            return _diffusers(folder, weights, masters)
    steps = sorted(path for path in place.iterdir() if path.is_dir() and _is_step(path) and not path.name.endswith(EMA))
    if len(steps) == 1:
        return _step_folder(
            steps[0], weights, masters, [f"{place} has no file latest; {steps[0].name} is the only step in it."]
        )
    if steps:
        names = ", ".join(path.name for path in steps[:12])
        raise CheckpointError(
            f"{place} has no file latest, and several steps: {names}.", f"Give the one you mean: {steps[-1]}"
        )
    files = sorted(path for path in place.iterdir() if path.suffix in SUFFIXES and path.is_file())
    if len(files) == 1:
        return _file(files[0], weights, masters, [f"{files[0].name} is the only weights file in {place}."])
    entries = sorted(path.name + "/" * path.is_dir() for path in place.iterdir())
    raise CheckpointError(
        f"{place} is no place of weights that cogflow knows. It holds {', '.join(entries[:12]) or 'nothing'}.",
        _EXPECTED,
    )


def _is_step(folder: Path) -> bool:
    return any(PART_FILE.fullmatch(path.name) or SHARDED_MODEL.fullmatch(path.name) for path in folder.iterdir())


def _step_folder(folder: Path, weights: str, masters: str, notes: list[str]) -> Found:
    """An iteration of SAT, or a step of DeepSpeed: the same files."""
    folder, weights = _model_or_ema(folder, weights, notes)
    if not _is_step(folder):
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise CheckpointError(
            f"{folder} holds no mp_rank_00_model_states.pt. It holds {names or 'nothing'}.", _EXPECTED
        )
    sharded = {int(match[2]) for path in folder.iterdir() if (match := SHARDED_MODEL.fullmatch(path.name))}
    parts = part_files(folder)
    with_masters = has_optimizer_states(folder)
    if weights == "ema" and masters == "fp32" and with_masters:
        raise CheckpointError(
            f"{folder} keeps its average only as stored: the fp32 master weights beside it are those of the model.",
            "Use masters=auto with weights=ema, or weights=model.",
        )
    own = re.fullmatch(rf"\d+({EMA})?|release", folder.name) is None  # SAT's folders are named by a number
    fp32 = masters == "fp32" or (masters == "auto" and with_masters and weights == "model" and (own or bool(sharded)))
    if fp32 and (with_masters or sharded):
        zeros = [ZeroCheckpoint(folder, "fp32", part) for part in sorted(sharded) or range(len(parts))]
    elif sharded:
        zeros = [ZeroCheckpoint(folder, "bf16", part) for part in sorted(sharded)]
    else:
        zeros = []
        if with_masters:
            notes.append("The weights are taken as stored; fp32 master weights lie beside them (masters=fp32).")
    files: list[Path] = []
    metadata: dict[str, Any] = {}
    sources: list[TensorSource] = []
    opened: ZeroCheckpoint | TorchFile
    for opened in zeros or map(TorchFile, parts):
        if isinstance(opened, ZeroCheckpoint):
            files += opened.files
            notes += opened.notes
        else:
            check_part_count(opened, len(parts))
            files.append(opened.path)
        metadata = metadata or dict(opened.metadata)
        sources.append(opened)
    tensors = join_parts(sources)
    if len(sources) > 1:
        notes.append(f"{len(sources)} model-parallel parts are joined.")
    if masters == "fp32" and not zeros:
        _must_be_fp32(folder, tensors.tensors)
    kind = _kind(folder, tensors.tensors, or_diffusers=True)
    return Found(kind, tensors, folder, files, _step(metadata, folder.name), weights, _yamls(folder), metadata, notes)


def _model_or_ema(folder: Path, weights: str, notes: list[str]) -> tuple[Path, str]:
    """The iteration or its ``-ema`` beside it, as asked for; else the one given."""
    given = "ema" if folder.name.endswith(EMA) else "model"
    name = folder.name.removesuffix(EMA)
    other = folder.with_name(name if given == "ema" else name + EMA)
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


def _file(path: Path, weights: str, masters: str, notes: list[str]) -> Found:
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is one file of a folder.", "Give the folder, with config.json and all safetensors in it."
        )
    of_step = PART_FILE.fullmatch(path.name) is not None
    ema = of_step and path.parent.name.endswith(EMA)
    if weights == ("model" if ema else "ema"):
        raise CheckpointError(
            f"{path} is of weights={'ema' if ema else 'model'}.", "Give the folder that holds both, or the other file."
        )
    file = TorchFile(path)
    check_part_count(file, 1)
    if of_step and (parts := len(part_files(path.parent))) > 1:
        raise CheckpointError(f"{path} is one of {parts} model-parallel parts.", f"Give the folder: {path.parent}")
    if masters == "fp32":
        _must_be_fp32(path, file.tensors)
    if file.wrapper != "none":
        notes.append(f"The weights lie under {file.wrapper} in {path.name}.")
    step = _step(file.metadata, path.parent.name if of_step else "")
    return Found(
        _kind(path, file.tensors),
        file,
        path,
        [path],
        step,
        "ema" if ema else "model",
        _yamls(path.parent),
        dict(file.metadata),
        notes,
    )


def _diffusers(folder: Path, weights: str, masters: str) -> Found:
    if weights == "ema":
        raise CheckpointError(
            f"{folder} holds no EMA weights.", "weights=ema needs SAT's <iteration>-ema, or a checkpoint of cogflow."
        )
    stem = STEM if any(folder.glob(f"{STEM}*.safetensors*")) else "model"
    source = WeightsFolder(folder, stem)
    if masters == "fp32":
        _must_be_fp32(folder, source.tensors)
    return Found(
        "diffusers",
        source,
        folder,
        list(source.files),
        None,
        "model",
        [],
        {"config": read_json(folder / "config.json")},
    )


def _kind(place: Path, tensors: Mapping[str, TensorInfo], or_diffusers: bool = False) -> str:
    """What the names are; :class:`CheckpointError`, showing some, when they are none of those known."""
    if any(name.startswith(SAT_HEADS) for name in tensors):
        return "sat"
    if any(name.startswith(VAE_HEADS) for name in tensors):
        return "vae"
    like_diffusers = any(word in name for name in tensors for word in DIFFUSERS_WORDS)
    if like_diffusers and or_diffusers:
        return "zero"
    lines = [f"{name} {tuple(info.shape)}" for name, info in tensors.items()]
    raise CheckpointError(
        f"{place} holds weights, but {'of diffusers, not of SAT' if like_diffusers else 'of no layout that cogflow knows'}. "
        f"Its tensors are named:\n{format_list(lines, 6)}",
        "diffusers' weights are read from a folder with config.json and safetensors (save_pretrained)."
        if like_diffusers
        else f"Expected are names that begin with {', '.join(SAT_HEADS[:4])} (SAT) or encoder.down. (its VAE).",
    )


def _must_be_fp32(place: Path, tensors: Mapping[str, TensorInfo]) -> None:
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


def _step(metadata: Mapping[str, Any], name: str) -> int | None:
    """What the file says, else the number in its folder's name. SAT counts in ``iteration`` and may leave ``global_steps`` at 0."""
    for key in ("iteration", "global_steps"):
        value = metadata.get(key)
        if isinstance(value, int) and value > 0:
            return value
    match = re.fullmatch(rf"(?:global_step)?(\d+)(?:{EMA})?", name)
    return int(match[1]) if match else None


def _yamls(folder: Path) -> list[Path]:
    """The training's own record of its settings, and the settings it was given."""
    found: list[Path] = []
    for place in (folder, folder.parent):
        found += [path for path in (place / "training_config.yaml", place / SIZES) if path.is_file()]
        found += sorted(path for path in (place / "configs").glob("*.y*ml") if path.is_file())
    return found
