"""Write the model card (README.md) of a pipeline folder: usage, facts, training, samples, ladder and origin of
components.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cogflow.assemble.components import PipelineComponent
from cogflow.errors import CogflowError
from cogflow.files.contained_files import copy_below, is_file_below, plain_name
from cogflow.files.printable import one_line, printable
from cogflow.files.record_io import JsonObject, read_record
from cogflow.records.pipeline_records import (
    AssembledComponent,
    AssemblyRecord,
    ContradictionRecord,
    PipelineSampling,
    TransformerOrigin,
    VerifyRecord,
)
from cogflow.records.run_records import StageRecord
from cogflow.runtime.progress import clock
from cogflow.sampling.sample_record import read_sample_record
from cogflow.tracking.weights_origin import describe_origin

CONTACT_SHEET = "contact.png"
SAMPLES_FOLDER = "samples"
"""Folder of the pipeline that the sample videos are copied to."""

TORCH_DTYPES = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}

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
"""Component -> settings that the card lists."""

Row = Sequence[Any]


@dataclass(frozen=True)
class CardContext:
    """The sources of the card's optional sections; ``None`` where it is unknown.

    ``run``: the run that trained the transformer. ``samples``: the folder of its samples with the same weights.
    ``command``: the command that assembles. The folders are read when the card is written, after the last rung of the
    ladder was measured.
    """

    run: Path | None = None
    samples: Path | None = None
    command: str = ""


@dataclass(frozen=True)
class CardSections:
    """Content of the card's optional sections; empty where there is none.

    ``training``: rows of setting and value. ``videos``: (path in the pipeline folder, prompt). ``sheet``: path of the
    contact sheet. ``ladder``: rows below ``ladder_columns``.
    """

    command: str = ""
    training: list[tuple[str, str]] = field(default_factory=list)
    videos: list[tuple[str, str]] = field(default_factory=list)
    sheet: str | None = None
    ladder_columns: list[str] = field(default_factory=list)
    ladder: list[Row] = field(default_factory=list)


def collect_sections(context: CardContext, pipeline: Path) -> CardSections:
    """Copy the sample videos to ``pipeline/samples`` and return the content of the card's optional sections."""
    command, training = shorten_command(context.command), _training_rows(context.run)
    if context.samples is None:
        return CardSections(command, training)
    record = read_sample_record(context.samples)
    target = pipeline / SAMPLES_FOLDER
    target.mkdir()
    root, folder = _root_and_name(context.samples, context.run)
    for sample in record.samples:
        video = plain_name(context.samples, sample.video)
        copy_below(root, f"{folder}{video}", target, video)
    sheet = None
    if is_file_below(root, f"{folder}{CONTACT_SHEET}"):
        copy_below(root, f"{folder}{CONTACT_SHEET}", target, CONTACT_SHEET)
        sheet = f"{SAMPLES_FOLDER}/{CONTACT_SHEET}"
    columns, ladder = _ladder_table(context.run)
    return CardSections(
        command=command,
        training=training,
        videos=[(f"{SAMPLES_FOLDER}/{sample.video}", sample.text) for sample in record.samples],
        sheet=sheet,
        ladder_columns=columns,
        ladder=ladder,
    )


def _root_and_name(samples: Path, run: Path | None) -> tuple[Path, str]:
    """Return the folder that the sample files are opened below, and the prefix of their names in it.

    Below the run, so that a folder of the run that is a link is refused, too.
    """
    if run is not None and samples.is_relative_to(run) and samples != run:
        return run, f"{samples.relative_to(run).as_posix()}/"
    return samples, ""


def _ladder_table(run: Path | None) -> tuple[list[str], list[Row]]:
    """Return columns and rows of the run's sharpness ladder; both are empty when there is none."""
    if run is None:
        return [], []
    # Imported here: the statistics take a tenth of the memory of an assembly, and most assemblies have no run.
    from cogflow.ladder.ladder_record import read_ladder
    from cogflow.ladder.ladder_report import COLUMNS, table_cells
    from cogflow.ladder.rung_findings import evaluate_ladder

    rows, _ = evaluate_ladder(read_ladder(run), run)
    return COLUMNS, [table_cells(row) for row in rows]


def _training_rows(run: Path | None) -> list[tuple[str, str]]:
    """Return rows of setting and value from the run's train.json; empty when there is none."""
    if run is None:
        return []
    try:
        record = read_record(run / "train.json", StageRecord)
    except CogflowError:
        return []
    stage, data, model = (_section(record.settings, name) for name in ("stage", "data", "model"))
    ranks_per_clip = _section(record.settings, "parallel").get("sequence", 1)
    clips = " x ".join(str(data[key]) for key in ("frames", "height", "width") if key in data)
    versions = [record.versions.get(name, "unknown") for name in ("cogflow", "torch", "diffusers")]
    rows = [
        ("started from", model.get("name")),
        ("clips", f"{clips} at {data['fps']:g} frames per second" if data.get("fps") else None),
        ("clips per rank and micro step", stage.get("batch_size")),
        ("ranks that share a clip", ranks_per_clip if ranks_per_clip != 1 else None),
        ("micro steps per step", stage.get("gradient_accumulation")),
        ("learning rate", f"{stage['learning_rate']:g}, {stage.get('schedule')}" if "learning_rate" in stage else None),
        ("dropped captions", stage.get("text_dropout")),
        ("EMA decay", stage.get("ema_decay") or None),
        ("seed", stage.get("seed")),
        ("result", record.summary or None),
        ("time", clock(record.seconds) if record.seconds else None),
        ("cogflow, torch, diffusers", ", ".join(versions)),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _section(settings: JsonObject, name: str) -> Mapping[str, Any]:
    section = settings.get(name)
    return section if isinstance(section, Mapping) else {}


def card_text(
    title: str,
    components: Mapping[str, PipelineComponent],
    assembly: AssemblyRecord,
    sections: CardSections,
) -> str:
    """Return the text of README.md."""
    made = assembly.made
    from_image = components["transformer"].from_image
    family = _escape_cell(made.family or "CogVideoX")
    verified = f"{_verified(assembly.verify)} Every file's hash is in `assembly.json`."
    return f"""---
library_name: diffusers
pipeline_tag: {"image-to-video" if from_image else "text-to-video"}
tags: [cogvideox, video, finetuned]
---

# {_escape_cell(title)}

A {family} transformer finetuned with cogflow{_steps(made)}, assembled with the components below.

## Use

{_usage(title, assembly.sampling, components["transformer"].settings.get("max_text_seq_length"), from_image)}
## Facts

| setting | value |
| --- | --- |
{_facts(components, made)}
{_forced(assembly.forced or [])}{_optional_sections(sections)}
## Origin

| component | class | from | sha256 of its largest file |
| --- | --- | --- | --- |
{_origins(assembly.components)}

{_trained_in(made)}{verified}
{_command(sections.command)}"""


def _usage(title: str, sampling: PipelineSampling, length: int | None, from_image: bool) -> str:
    pipeline = "CogVideoXImageToVideoPipeline" if from_image else "CogVideoXPipeline"
    utilities = "export_to_video, load_image" if from_image else "export_to_video"
    image = '\n    image=load_image("first-frame.png"),' if from_image else ""
    dtype = TORCH_DTYPES.get(sampling.dtype, "torch.float32")
    code = f"""import torch
from diffusers import {pipeline}
from diffusers.utils import {utilities}

pipe = {pipeline}.from_pretrained({_python_string(title)}, torch_dtype={dtype})
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
frames = pipe({image}
    prompt={_python_string(str(sampling.text or "a prompt"))},
    height={sampling.height},
    width={sampling.width},
    num_frames={sampling.frames},
    num_inference_steps={sampling.steps},
    guidance_scale={sampling.guidance_scale},
    use_dynamic_cfg={sampling.use_dynamic_cfg},
    max_sequence_length={length if isinstance(length, int) else None},
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(frames, "video.mp4", fps={round(sampling.fps)})
"""
    return f"""{_fenced("python", code)}
`max_sequence_length` is the length that captions were padded to in training; diffusers' own default is 226.
"""


def _steps(made: TransformerOrigin) -> str:
    if made.step is None:
        return ""
    return f" for {made.step} steps" + (" (moving average of the weights)" if made.weights == "ema" else "")


def _facts(components: Mapping[str, PipelineComponent], made: TransformerOrigin) -> str:
    rows = [(f"{name}.{key}", components[name].settings.get(key)) for name, keys in FACTS.items() for key in keys]
    if made.trained_with is not None and made.trained_with.dtype:
        rows.append(("dtype of training", made.trained_with.dtype))
    overridden = {f"{name}.{key}" for name, component in components.items() for key in component.overrides}
    return "\n".join(
        f"| {name} | {_escape_cell(value)}{', set by hand' if name in overridden else ''} |" for name, value in rows
    )


def _forced(forced: Sequence[ContradictionRecord]) -> str:
    if not forced:
        return ""
    lines = [_escape_cell(f"- **{one.key} is {one.value}**; {one.why} {one.needed}.") for one in forced]
    return "\nAssembled with `stage.force` in spite of these contradictions:\n\n" + "\n".join(lines) + "\n"


def _optional_sections(sections: CardSections) -> str:
    text = ""
    if sections.training:
        text += "\n## Training\n\n" + _table(("setting", "value"), sections.training)
    if sections.videos:
        sheet = f"![one frame of each sample]({sections.sheet})\n\n" if sections.sheet else ""
        text += "\n## Samples\n\nSamples of the training run with these weights:\n\n" + sheet
        text += "".join(f"- [{_escape_cell(prompt)}]({quote(path)})\n" for path, prompt in sections.videos)
    if sections.ladder:
        text += "\n## The sharpness ladder\n\n"
        text += "Changes are medians over pairs of clips with their 95 % interval; negative values are softer.\n\n"
        text += _table(sections.ladder_columns, sections.ladder)
    return text


def _origins(components: Mapping[str, AssembledComponent]) -> str:
    rows = []
    for name, component in components.items():
        # Only the last names of the path: they identify the folder and hide the layout of the user's disk.
        origin = "/".join(Path(component.origin).parts[-3:])
        largest = max(component.files.values(), key=lambda file: file.bytes)
        rows.append(f"| {name} | {_escape_cell(component.class_name)} | {_escape_cell(origin)} | `{largest.sha256}` |")
    return "\n".join(rows)


def _trained_in(made: TransformerOrigin) -> str:
    """Return a sentence with the step, the line and the name of the run; its path would show the user's disk."""
    origin = describe_origin(made.run and Path(made.run).name, made.line, made.step)
    return f"The transformer is {origin}.\n\n" if origin and made.run else ""


def _verified(verify: VerifyRecord | None) -> str:
    if verify is None or verify.status != "passed" or not verify.samples:
        reason = verify and (verify.reason or verify.line or verify.status)
        return f"It was not compared with samples of the training run: {_escape_cell(reason)}."
    return (
        f"A fresh process with diffusers alone sampled the training run's {len(verify.samples)} samples again: "
        f"lowest PSNR {min(sample.psnr for sample in verify.samples):.1f} dB, "
        f"largest difference {max(sample.max_difference for sample in verify.samples)}/255."
    )


def _command(command: str) -> str:
    return f"\nAssembled by\n\n{_fenced('bash', command)}" if command else ""


def _fenced(language: str, code: str) -> str:
    """Return a code block whose fence is longer than any run of backticks in ``code``, so that nothing ends it."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(code).rstrip()}\n{fence}\n"


def _python_string(text: str) -> str:
    """Return a Python literal in double quotes on one line, without control and format characters."""
    return one_line(json.dumps(text, ensure_ascii=False))


def _table(columns: Sequence[str], rows: Iterable[Row]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(_escape_cell(cell) for cell in line) + " |\n" for line in lines)


def _escape_cell(cell: Any) -> str:
    """Return ``cell`` as text that breaks neither a Markdown table nor a link and contains no HTML."""
    text = one_line(str(cell).replace("\n", " "))
    return re.sub(r"[|\[\]<`]", r"\\\g<0>", text)


def shorten_paths(text: str) -> str:
    """Return ``text`` with every absolute path cut to its last two names, which hides the layout of the user's disk."""
    return re.sub(r"(?<![\w.~])/(?:[^\s'\"/,\]]+/)+([^\s'\"/,\]]+/[^\s'\"/,\]]+)", r".../\1", text)


def shorten_command(command: str) -> str:
    """Return ``command`` with its absolute paths cut as in :func:`shorten_paths`. Paths may contain spaces."""
    absolute_path = re.compile(r"(?<![\w.~])/(?:[^/,\]]+/)+([^/,\]]+/[^/,\]]+)")
    return shlex.join(absolute_path.sub(r".../\1", word) for word in shlex.split(command))
