"""The model card of a pipeline folder: what it is, how to load it with diffusers alone, where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogflow.assemble.components import PipelineComponent

DTYPES = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}


def card(
    title: str,
    parts: Mapping[str, PipelineComponent],
    assembly: Mapping[str, Any],
    samples: Mapping[str, Any],
    told: Mapping[str, Any] | None = None,
) -> str:
    """README.md. ``samples``: height, width, frames, fps, steps, guidance_scale, use_dynamic_cfg, dtype and perhaps text. ``told``: as
    :func:`cogflow.assemble.card_context.take_along` gives it."""
    transformer, made = parts["transformer"], parts["transformer"].made
    from_image = transformer.settings.get("in_channels") != parts["vae"].settings.get("latent_channels")
    pipeline, tag = (
        ("CogVideoXImageToVideoPipeline", "image-to-video") if from_image else ("CogVideoXPipeline", "text-to-video")
    )
    image_import = (
        "from diffusers.utils import export_to_video, load_image"
        if from_image
        else "from diffusers.utils import export_to_video"
    )
    image_argument = '\n    image=load_image("first-frame.png"),' if from_image else ""
    prompt = str(samples.get("text") or "a prompt").replace("\\", "\\\\").replace('"', '\\"')
    return f"""---
library_name: diffusers
pipeline_tag: {tag}
tags: [cogvideox, video, finetuned]
---

# {title}

A {made.get("family") or "CogVideoX"} transformer finetuned with cogflow{_step(made)}, assembled with the components below.

## Use

```python
import torch
from diffusers import {pipeline}
{image_import}

pipe = {pipeline}.from_pretrained("{title}", torch_dtype={DTYPES.get(str(samples.get("dtype")), "torch.float32")})
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
frames = pipe({image_argument}
    prompt="{prompt}",
    height={samples["height"]},
    width={samples["width"]},
    num_frames={samples["frames"]},
    num_inference_steps={samples["steps"]},
    guidance_scale={samples["guidance_scale"]},
    use_dynamic_cfg={samples["use_dynamic_cfg"]},
    max_sequence_length={transformer.settings.get("max_text_seq_length")},
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(frames, "video.mp4", fps={round(float(samples["fps"]))})
```

`max_sequence_length` is the length that captions were padded to in training; diffusers' own default is 226.

## Facts

| setting | value |
| --- | --- |
{_facts(parts)}
{_forced(assembly.get("forced") or [])}{_story(told or {})}
## Origin

| component | class | from | sha256 of its largest file |
| --- | --- | --- | --- |
{_origins(assembly["components"])}

{_verified(assembly["verify"])} Every file's hash is in `assembly.json`.
{_command(told or {})}"""


def _step(made: Mapping[str, Any]) -> str:
    if made.get("step") is None:
        return ""
    return f" for {made['step']} steps" + (" (moving average of the weights)" if made.get("weights") == "ema" else "")


FACTS = {
    "vae": ("scaling_factor", "invert_scale_latents", "latent_channels"),
    "scheduler": ("prediction_type", "snr_shift_scale", "timestep_spacing", "rescale_betas_zero_snr"),
    "transformer": (
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "use_rotary_positional_embeddings",
        "max_text_seq_length",
    ),
}


def _facts(parts: Mapping[str, PipelineComponent]) -> str:
    rows = [(f"{name}.{key}", parts[name].settings.get(key)) for name, keys in FACTS.items() for key in keys]
    trained = parts["transformer"].made.get("trained_with") or {}
    rows += [("trained in", trained["dtype"])] if trained.get("dtype") else []
    given = {f"{name}.{key}" for name, part in parts.items() for key in part.set}
    return "\n".join(f"| {name} | {value}{', set by hand' if name in given else ''} |" for name, value in rows)


def _forced(forced: Sequence[Mapping[str, Any]]) -> str:
    """What was assembled against better knowledge stands where the values stand."""
    if not forced:
        return ""
    lines = [f"- **{one['key']} is {one['value']}**; {one['why']} {one['needed']}." for one in forced]
    return "\nAssembled with `stage.force`, in spite of:\n\n" + "\n".join(lines) + "\n"


def _story(told: Mapping[str, Any]) -> str:
    text = ""
    if rows := told.get("training"):
        text += "\n## Training\n\n" + _table(("setting", "value"), rows)
    if videos := told.get("videos"):
        sheet = f"![one frame of each sample]({told['sheet']})\n\n" if told.get("sheet") else ""
        text += "\n## Samples\n\nOf the training run, with these weights:\n\n" + sheet
        text += "".join(f"- [{_plain(prompt)}]({path})\n" for path, prompt in videos)
    if ladder := told.get("ladder"):
        text += "\n## The sharpness ladder\n\nChanges are medians over pairs of clips, with their 95 % interval; below zero is softer.\n\n"
        text += _table(*ladder)
    return text


def _command(told: Mapping[str, Any]) -> str:
    return f"\nAssembled by\n\n```bash\n{told['command']}\n```\n" if told.get("command") else ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(_plain(cell) for cell in line) + " |\n" for line in lines)


def _plain(cell: Any) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ").replace("[", "\\[").replace("]", "\\]")


def _origins(components: Mapping[str, Any]) -> str:
    rows = []
    for name, component in components.items():
        # The last names of the path: enough to recognise it, without telling where somebody's disk is mounted.
        origin = "/".join(Path(component["from"]).parts[-3:])
        largest = max(component["files"].values(), key=lambda file: int(file["bytes"]))
        rows.append(f"| {name} | {component['class']} | {origin} | `{largest['sha256']}` |")
    return "\n".join(rows)


def _verified(verify: Mapping[str, Any]) -> str:
    if verify["status"] != "passed":
        return f"It was not compared with samples of the training run: {verify.get('reason', verify['status'])}."
    return (
        f"Loaded in a fresh process with diffusers alone, it gave the training run's own {len(verify['samples'])} samples again: "
        f"lowest PSNR {min(sample['psnr'] for sample in verify['samples']):.1f} dB, "
        f"largest difference {max(sample['max_difference'] for sample in verify['samples'])}/255."
    )
