"""Read checkpoints that other programs wrote: SAT's folders and files, its VAE, and DeepSpeed checkpoints.

SAT and DeepSpeed write the same files: a folder with ``latest``, and one folder per step with
``mp_rank_00_model_states.pt``. The names of the tensors tell them apart (:func:`layout_of`).
:mod:`cogflow.artifacts.identify` decides which reader a path needs.

A model-parallel checkpoint of SAT has one file per part (``mp_rank_00_model_states.pt``, ``mp_rank_01_...``). Its parts
are joined as SAT's ``sat/mpu/layers.py`` and ``sat/model/transformer.py`` (0.4.12) split them. In each layer the fused
query_key_value is split by rows within each third, dense_h_to_4h by rows, dense and dense_4h_to_h by columns. Their
biases are split like the rows, or are stored whole. All other tensors are equal in every part; a tensor that differs
stops the export.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from cogflow.errors import CheckpointError, ConversionError, format_list
from cogflow.files.record_io import JsonObject
from cogflow.weights.tensor_source import TensorInfo, TensorSource, contained_file
from cogflow.weights.torch_file import TorchFile
from cogflow.weights.zero import SHARDED_MODEL, ZeroCheckpoint, has_optimizer_states, missing_numbers, read_state_file

PART_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
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
    metadata: JsonObject = field(default_factory=dict)
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
    messages = list(notes)
    folder, weights = _model_or_ema(folder, weights, messages)
    if not is_step_folder(folder):
        raise no_states(folder)
    with_masters = has_optimizer_states(folder)
    if weights == "ema" and masters == "fp32" and with_masters:
        raise CheckpointError(
            f"{folder} keeps its average only as stored: the fp32 master weights beside it are those of the model.",
            "Use masters=auto with weights=ema, or weights=model.",
        )
    opened = _open_parts(folder, weights, masters, with_masters=with_masters)
    zeros = [one for one in opened if isinstance(one, ZeroCheckpoint)]
    if with_masters and not zeros:
        messages.append("The weights are read as stored; fp32 master weights are beside them (masters=fp32).")
    files: list[Path] = []
    for one in opened:
        files += one.files if isinstance(one, ZeroCheckpoint) else [one.path]
        messages += one.notes if isinstance(one, ZeroCheckpoint) else []
    metadata = next((dict(one.metadata) for one in opened if one.metadata), {})
    tensors = join_parts(opened)
    if len(opened) > 1:
        messages.append(f"{len(opened)} model-parallel parts are joined.")
    if masters == "fp32" and not zeros:
        _refuse_low_precision(folder, tensors.tensors)
    layout = layout_of(tensors.tensors)
    if layout is None:
        raise unknown_names(folder, tensors.tensors)
    return ForeignWeights(
        layout=layout,
        tensors=tensors,
        origin=folder,
        files=files,
        step=step_in(metadata, folder.name),
        weights=weights,
        yamls=_yamls(folder),
        metadata=metadata,
        notes=messages,
    )


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
    wrapped = [] if file.wrapper == "none" else [f"The weights are under {file.wrapper} in {path.name}."]
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
        return list(TorchFile(contained_file(folder, names[0])).tensors)
    states = read_state_file(contained_file(folder, names[0]))
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


def step_in(metadata: JsonObject, name: str) -> int | None:
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


def _open_parts(folder: Path, weights: str, masters: str, *, with_masters: bool) -> list[ZeroCheckpoint | TorchFile]:
    """Open every model-parallel part of a step folder, as master weights or as stored."""
    parts = part_files(folder)
    sharded = sorted({int(match[2]) for path in folder.iterdir() if (match := SHARDED_MODEL.fullmatch(path.name))})
    # SAT names a folder by a number.
    deepspeed_folder = re.fullmatch(rf"\d+({EMA_SUFFIX})?|release", folder.name) is None
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
            notes.append(f"The model's weights are read; their average is beside them, in {other.name} (weights=ema).")
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
        found += [contained_file(place, name) for name in ("training_config.yaml", SIZES) if (place / name).is_file()]
        configs = place / "configs"
        names = sorted(path.name for path in configs.glob("*.y*ml") if path.is_file())
        found += [contained_file(contained_file(place, "configs"), name) for name in names]
    return found


# Model-parallel parts

_LAYER = re.compile(
    r"(?P<block>(?:.*\.)?transformer\.layers\.\d+\.(?:attention|mlp)\.)"
    r"(?P<linear>\w+)\.(?:original\.)?(?P<kind>\w+)(?:\.\d+)?"
)
_MERGE_WITH_SAT = "Merge the parts with SAT itself (MP1) and export the result."


@dataclass(frozen=True)
class _Split:
    """A split along ``dim``, within each of ``stride`` equal blocks."""

    dim: int
    stride: int = 1


_SPLITS = {
    ("query_key_value", "weight"): _Split(0, 3),
    ("query_key_value", "bias"): _Split(0, 3),
    ("dense_h_to_4h", "weight"): _Split(0),
    ("dense_h_to_4h", "bias"): _Split(0),
    ("dense", "weight"): _Split(1),
    ("dense_4h_to_h", "weight"): _Split(1),
}
_NOT_SPLIT = {("dense", "bias"), ("dense_4h_to_h", "bias")}


def part_files(folder: Path) -> list[Path]:
    """Return the parts in an iteration's folder, ordered by number; empty if there is none.

    Raises :class:`CheckpointError` if a number is missing.
    """
    parts = {int(match[1]): path for path in folder.iterdir() if (match := PART_FILE.fullmatch(path.name))}
    if missing := missing_numbers(parts):
        names = ", ".join(f"mp_rank_{number:02d}_model_states.pt" for number in missing)
        raise CheckpointError(
            f"{folder} lacks {names}; it holds parts up to {max(parts)}.", "Copy every part of the checkpoint."
        )
    return [contained_file(folder, parts[number].name) for number in sorted(parts)]


def check_part_count(file: TorchFile, parts: int) -> None:
    """Raise :class:`CheckpointError` if a file states that it is one of more or fewer parts than ``parts``."""
    count = file.metadata.get("mp_world_size")
    if isinstance(count, int) and count != parts:
        raise CheckpointError(
            f"{file.path} was saved as one of {count} model-parallel parts; "
            f"{parts} {'is' if parts == 1 else 'are'} here.",
            "Give the iteration's folder, with mp_rank_00_model_states.pt and all other parts in it.",
        )


def join_parts(parts: Sequence[TensorSource]) -> TensorSource:
    """Return one source made of the parts, ordered by number; a single part is returned unchanged.

    Names, shapes and dtypes are compared now. Values that must be equal in every part are compared when they are read.
    Raises :class:`ConversionError`, naming the tensors, for parts that cannot be joined with certainty.
    """
    if not parts:
        raise CheckpointError("There are no model-parallel parts to join.")
    return parts[0] if len(parts) == 1 else JoinedTensors(parts)


class JoinedTensors:
    """Several parts as one source. See :func:`join_parts`."""

    def __init__(self, parts: Sequence[TensorSource]) -> None:
        self.parts = list(parts)
        self._splits: dict[str, _Split | None] = {}
        problems: list[str] = []
        tensors: dict[str, TensorInfo] = {}
        names = list(dict.fromkeys(name for part in self.parts for name in part.tensors))
        for name in names:
            holders = [number for number, part in enumerate(self.parts) if name in part.tensors]
            if len(holders) < len(self.parts):
                problems.append(f"{name}: only in part {', '.join(map(str, holders))}")
                continue
            infos = [part.tensors[name] for part in self.parts]
            problem = _split_problem(name, infos)
            if problem:
                problems.append(f"{name}: {problem}")
                continue
            self._splits[name] = _split_of(name)
            tensors[name] = _joined_info(infos, self._splits[name])
        problems += _layer_problems(tensors)
        if problems:
            raise ConversionError(
                f"The {len(self.parts)} model-parallel parts cannot be joined:\n{format_list(problems)}",
                _MERGE_WITH_SAT,
            )
        self.tensors: Mapping[str, TensorInfo] = tensors

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, a copy if it is joined. Raises :class:`ConversionError` if an unsplit tensor differs."""
        values = [part.read(name) for part in self.parts]
        split = self._splits[name]
        if split is None:
            for number, value in enumerate(values[1:], 1):
                if not _equal_bits(values[0], value):
                    raise ConversionError(
                        f"{name} differs between the model-parallel parts 0 and {number}, and cogflow does not know it "
                        "to be split.",
                        _MERGE_WITH_SAT,
                    )
            return values[0]
        blocks = [value.chunk(split.stride, split.dim) for value in values]
        return torch.cat([block[number] for number in range(split.stride) for block in blocks], split.dim)


def _layer_key(name: str) -> tuple[str, str] | None:
    """Return (linear layer, weight or bias) of a tensor in a transformer layer, ``None`` for other tensors."""
    match = _LAYER.fullmatch(name)
    return (match["linear"], match["kind"]) if match else None


def _split_of(name: str) -> _Split | None:
    key = _layer_key(name)
    return _SPLITS.get(key) if key else None


def _split_problem(name: str, infos: list[TensorInfo]) -> str:
    """Return why it is unknown how a tensor's parts are joined; empty if it is known."""
    shapes = [info.shape for info in infos]
    if len(set(shapes)) > 1:
        return f"shapes {', '.join(map(str, shapes))}"
    if len({info.dtype for info in infos}) > 1:
        return f"dtypes {', '.join(str(info.dtype) for info in infos)}"
    key = _layer_key(name)
    if key is None or key in _NOT_SPLIT:
        return ""
    split = _SPLITS.get(key)
    if split is None:
        return "it is unknown how SAT splits it"
    if len(shapes[0]) != (2 if key[1] == "weight" else 1):
        return f"{shapes[0]} is no shape of a linear layer"
    if shapes[0][split.dim] % split.stride:
        return f"{shapes[0][split.dim]} rows do not divide into queries, keys and values of equal size"
    return ""


def _joined_info(infos: list[TensorInfo], split: _Split | None) -> TensorInfo:
    if split is None:
        return infos[0]
    shape = list(infos[0].shape)
    shape[split.dim] *= len(infos)
    return replace(infos[0], shape=tuple(shape))


def _layer_problems(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the joined layers whose shapes do not fit together.

    This finds tensors that every part holds whole, and layers with fewer keys than queries.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in tensors.items():
        if (match := _LAYER.fullmatch(name)) and match["kind"] == "weight":
            shapes.setdefault(match["block"], {})[match["linear"]] = info.shape
    problems = []
    for block, layer in shapes.items():
        qkv, dense = layer.get("query_key_value"), layer.get("dense")
        if qkv and dense and (dense[0] != dense[1] or qkv != (3 * dense[0], dense[0])):
            problems.append(f"{block}*: joined to query_key_value {qkv} and dense {dense}, which do not fit")
        up, down = layer.get("dense_h_to_4h"), layer.get("dense_4h_to_h")
        if up and down and (up != down[::-1] or up[0] != 4 * up[1]):
            problems.append(f"{block}*: joined to dense_h_to_4h {up} and dense_4h_to_h {down}, which do not fit")
    return problems


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors are equal to the bit. NaN equals NaN."""
    return bool(torch.equal(a, b)) or bool(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )
