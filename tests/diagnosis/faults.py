"""Faults to plant in a copy of a sound pipeline, and changes that are no faults.

The diagnosis must name each fault and must not name the others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

STEM, TEXT = "diffusion_pytorch_model.safetensors", "model.safetensors"
BLOCK = "transformer_blocks.2."


@dataclass(frozen=True)
class World:
    """Two short finetunes of the shipped model ``base`` with EMA: ``run``, which wrote ``pipeline``, and ``other``."""

    run: Path
    other: Path
    base: Path

    @property
    def pipeline(self) -> Path:
        return self.run / "pipeline"

    def weights(self, run: Path, part: str = "ema", step: int | None = None) -> dict[str, torch.Tensor]:
        steps = sorted((run / "checkpoints").glob("step-*"))
        chosen = steps[-1] if step is None else run / f"checkpoints/step-{step:06d}"
        return load_file(chosen / part / STEM)


Plant = Callable[[Path, World], None]


@dataclass(frozen=True)
class Fault:
    """``plant`` changes a copy of the pipeline. The diagnosis must name ``component`` and a field or tensor that
    starts with ``name``.
    """

    title: str
    plant: Plant
    component: str
    name: str = ""


def field(component: str, key: str, value: Any) -> Plant:
    def plant(folder: Path, _: World) -> None:
        names = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
        path = folder / component / names.get(component, "config.json")
        config = json.loads(path.read_text())
        if config.get(key) == value:
            raise AssertionError(f"{component}.{key} is {value} already, so this plants no fault")
        write(path, json.dumps(config | {key: value}))

    return plant


def tensors(component: str, change: Callable[[dict[str, torch.Tensor], World], None]) -> Plant:
    def plant(folder: Path, world: World) -> None:
        path = folder / component / (TEXT if component == "text_encoder" else STEM)
        before = load_file(path)
        after = dict(before)
        change(after, world)
        if all(torch.equal(after[name], before[name]) for name in before if name in after) and set(after) == set(
            before
        ):
            raise AssertionError("nothing has changed, so this plants no fault")
        save(path, after)

    return plant


def static_guidance(folder: Path, _: World) -> None:
    path = folder / "assembly.json"
    assembly = json.loads(path.read_text())
    if assembly["sampling"]["use_dynamic_cfg"] is not True:
        raise AssertionError("guidance is static already")
    assembly["sampling"]["use_dynamic_cfg"] = False
    write(path, json.dumps(assembly))


def swap_q_and_k(weights: dict[str, torch.Tensor], _: World) -> None:
    for end in ("weight", "bias"):
        one, other = f"{BLOCK}attn1.to_q.{end}", f"{BLOCK}attn1.to_k.{end}"
        weights[one], weights[other] = weights[other], weights[one]


def swap_adaln_halves(weights: dict[str, torch.Tensor], _: World) -> None:
    for end in ("weight", "bias"):
        name = f"norm_out.linear.{end}"
        shift, scale = weights[name].chunk(2)
        weights[name] = torch.cat([scale, shift])


def swap_block_adaln(weights: dict[str, torch.Tensor], _: World) -> None:
    """Exchange shift and scale of a block's first norm."""
    for end in ("weight", "bias"):
        name = f"{BLOCK}norm1.linear.{end}"
        parts = list(weights[name].chunk(6))
        weights[name] = torch.cat([parts[1], parts[0], *parts[2:]])


def exchange_blocks(weights: dict[str, torch.Tensor], _: World) -> None:
    for name in [name for name in weights if name.startswith("transformer_blocks.1.")]:
        other = name.replace("blocks.1.", "blocks.3.")
        weights[name], weights[other] = weights[other], weights[name]


def scale_a_matrix(weights: dict[str, torch.Tensor], _: World) -> None:
    weights[f"{BLOCK}attn1.to_out.0.weight"] = 1.3 * weights[f"{BLOCK}attn1.to_out.0.weight"]


def block_of_another_step(weights: dict[str, torch.Tensor], world: World) -> None:
    weights |= {name: value for name, value in world.weights(world.run, step=6).items() if name.startswith(BLOCK)}


def mix_averages(weights: dict[str, torch.Tensor], world: World) -> None:
    raw = world.weights(world.run, "transformer")
    names = sorted(weights)
    weights |= {name: raw[name] for name in names[: len(names) // 2]}


def wrong_run(weights: dict[str, torch.Tensor], world: World) -> None:
    weights |= world.weights(world.other)


def initialised(weights: dict[str, torch.Tensor], _: World) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, value in weights.items():
        if value.dim() > 1:
            weights[name] = torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5
        else:
            weights[name] = (
                torch.ones_like(value) if "norm" in name and name.endswith("weight") else torch.zeros_like(value)
            )


def reset_decoder_block(weights: dict[str, torch.Tensor], _: World) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, value in weights.items():
        if name.startswith("decoder.up_blocks.1.resnets.0."):
            weights[name] = (
                0.02 * torch.randn(value.shape, generator=generator) if value.dim() > 1 else torch.zeros_like(value)
            )


def twice_through_bf16(weights: dict[str, torch.Tensor], _: World) -> None:
    for name, value in weights.items():
        weights[name] = value.bfloat16().float()


def in_half(weights: dict[str, torch.Tensor], _: World) -> None:
    for name, value in weights.items():
        weights[name] = value.half()


def without_a_tensor(weights: dict[str, torch.Tensor], _: World) -> None:
    del weights[f"{BLOCK}ff.net.2.weight"]


def not_a_number(weights: dict[str, torch.Tensor], _: World) -> None:
    value = weights[f"{BLOCK}ff.net.2.weight"].clone()
    value[0, 0] = float("nan")
    weights[f"{BLOCK}ff.net.2.weight"] = value


FAULTS = [
    Fault("wrong scaling factor", field("vae", "scaling_factor", 1.15258426), "vae", "scaling_factor"),
    Fault("wrong shift", field("scheduler", "snr_shift_scale", 3.0), "scheduler", "snr_shift_scale"),
    Fault(
        "epsilon in place of v-prediction",
        field("scheduler", "prediction_type", "epsilon"),
        "scheduler",
        "prediction_type",
    ),
    Fault(
        "no zero-terminal-SNR",
        field("scheduler", "rescale_betas_zero_snr", False),
        "scheduler",
        "rescale_betas_zero_snr",
    ),
    Fault("linspace", field("scheduler", "timestep_spacing", "linspace"), "scheduler", "timestep_spacing"),
    Fault("static in place of dynamic CFG", static_guidance, "sampling", "use_dynamic_cfg"),
    Fault(
        "rotary flag off", field("transformer", "use_rotary_positional_embeddings", False), "transformer", "use_rotary"
    ),
    Fault("1.5's invert_scale_latents", field("vae", "invert_scale_latents", True), "vae", "invert_scale_latents"),
    Fault("VAE in fp16", tensors("vae", in_half), "vae", "dtype"),
    Fault("a VAE decoder block reset", tensors("vae", reset_decoder_block), "vae", "decoder.up_blocks.1.resnets.0"),
    Fault(
        "q and k swapped in one block",
        tensors("transformer", swap_q_and_k),
        "transformer",
        "transformer_blocks.2.attn1.to_",
    ),
    Fault("adaLN halves swapped", tensors("transformer", swap_adaln_halves), "transformer", "norm_out.linear"),
    Fault(
        "shift and scale swapped in one block",
        tensors("transformer", swap_block_adaln),
        "transformer",
        "transformer_blocks.2.norm1",
    ),
    Fault(
        "one block of another step",
        tensors("transformer", block_of_another_step),
        "transformer",
        "transformer_blocks.2",
    ),
    Fault("last norm's eps", field("transformer", "norm_eps", 1e-2), "transformer", "norm_eps"),
    Fault("EMA and raw weights mixed", tensors("transformer", mix_averages), "transformer", ""),
    Fault("tokenizer's length", field("tokenizer", "model_max_length", 8), "tokenizer", "model_max_length"),
    Fault("rotary positions of another size", field("transformer", "sample_width", 48), "transformer", "sample_width"),
    Fault("another padding token", field("tokenizer", "pad_token", "</s>"), "tokenizer", "pad_token"),
    Fault("two blocks exchanged", tensors("transformer", exchange_blocks), "transformer", "transformer_blocks."),
    Fault("one matrix scaled", tensors("transformer", scale_a_matrix), "transformer", "transformer_blocks.2"),
    Fault("text encoder through bf16", tensors("text_encoder", twice_through_bf16), "text_encoder", ""),
    Fault("transformer at its initialisation", tensors("transformer", initialised), "transformer", ""),
    Fault("transformer of the wrong run", tensors("transformer", wrong_run), "transformer", ""),
    Fault(
        "a tensor missing",
        tensors("transformer", without_a_tensor),
        "transformer",
        "transformer_blocks.2.ff.net.2.weight",
    ),
    Fault(
        "a value that is no number",
        tensors("transformer", not_a_number),
        "transformer",
        "transformer_blocks.2.ff.net.2.weight",
    ),
]


def equal(_: Path, __: World) -> None:
    pass


def sharded(folder: Path, _: World) -> None:
    """Store the transformer in three files with an index."""
    path = folder / "transformer" / STEM
    weights = load_file(path)
    names = sorted(weights)
    stem = STEM.removesuffix(".safetensors")
    index: dict[str, str] = {}
    for number in range(3):
        part = names[number::3]
        shard = f"{stem}-{number + 1:05d}-of-00003.safetensors"
        save_file({name: weights[name].contiguous() for name in part}, path.parent / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(part, shard)
    path.unlink()
    total = sum(value.numel() * value.element_size() for value in weights.values())
    (path.parent / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )


def transformer_in_bf16(folder: Path, _: World) -> None:
    path = folder / "transformer" / STEM
    save(path, {name: value.bfloat16() for name, value in load_file(path).items()})


def all_in_bf16(folder: Path, world: World) -> None:
    transformer_in_bf16(folder, world)
    for path in (folder / "vae" / STEM, folder / "text_encoder" / TEXT):
        save(path, {name: value.bfloat16() for name, value in load_file(path).items()})


def older_configs(folder: Path, _: World) -> None:
    """Write configs like diffusers 0.30: another version, and no keys that have the default of their class."""
    for path in (
        folder / "vae/config.json",
        folder / "transformer/config.json",
        folder / "scheduler/scheduler_config.json",
    ):
        config = json.loads(path.read_text())
        config["_diffusers_version"] = "0.30.1"
        config["_name_or_path"] = "somewhere/else"
        for key in (
            "invert_scale_latents",
            "patch_bias",
            "ofs_embed_dim",
            "patch_size_t",
            "thresholding",
            "trained_betas",
        ):
            if config.get(key) in (False, None, True) and key in config and _is_default(path, key, config[key]):
                del config[key]
        write(path, json.dumps(config))


def _is_default(path: Path, key: str, value: Any) -> bool:
    import inspect

    import diffusers

    cls = getattr(diffusers, json.loads(path.read_text())["_class_name"])
    parameter = inspect.signature(cls.__init__).parameters.get(key)
    return parameter is not None and parameter.default == value


CLEAN: dict[str, Plant] = {
    "an equal copy": equal,
    "sharded otherwise": sharded,
    "transformer in bf16": transformer_in_bf16,
    "everything in bf16": all_in_bf16,
    "configs of an older diffusers": older_configs,
}


def planted(target: Path, plant: Plant, world: World) -> Path:
    """Copy the pipeline to ``target``, with hard links where nothing is written, and plant the change."""
    shutil.copytree(world.pipeline, target, copy_function=link)
    plant(target, world)
    return target


def link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def write(path: Path, text: str) -> None:
    """Write to a new file, because the old one may be a hard link to the sound pipeline's."""
    path.unlink()
    path.write_text(text)


def save(path: Path, weights: dict[str, torch.Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    path.unlink()
    save_file({name: value.contiguous() for name, value in weights.items()}, path, metadata=metadata)
