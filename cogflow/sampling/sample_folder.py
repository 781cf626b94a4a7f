"""A folder of samples: videos to watch, latents and frames to compare, and a record that proves which weights made them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cogflow.artifacts.run_layout import SAMPLES_RECORD, step_folders
from cogflow.data.video import write_video
from cogflow.files.atomic_write import write_json
from cogflow.files.publish import publish_folder
from cogflow.models.loading import dtype_name
from cogflow.runtime import ranks
from cogflow.runtime.progress import progress
from cogflow.sampling.sample_record import FRAMES_FILE
from cogflow.sampling.sampler import Request, Sampler
from cogflow.sharpness.metrics import measure
from cogflow.tracking.contact_sheet import contact_sheet

LATENTS_FILE = "latents.safetensors"
SHEET_COLUMNS = 5


def write_samples(
    target: Path, sampler: Sampler, wanted: Sequence[Request], *, fps: float, facts: dict[str, Any], title: str
) -> dict[str, Any]:
    """Sample ``wanted`` over all ranks and publish the folder ``target``; returns its ``samples.json`` on every rank.

    ``facts`` (step, weights, their hash) go into the record. Collective: every rank runs the same number of forward passes,
    which ZeRO-3 needs, whatever the number of prompts.
    """
    with contextlib.ExitStack() as stack:
        partial = ranks.broadcast(
            stack.enter_context(publish_folder(target, replace=True)) if ranks.is_main() else None
        )
        entries = _sample_share(partial, sampler, wanted, fps, title)
        sampler.finish()
        gathered = {entry["name"]: entry for share in ranks.gather(entries) for entry in share}
        record = {
            **facts,
            "sampling": sampler.about(),
            "height": sampler.height, "width": sampler.width, "frames": sampler.frames, "fps": fps,
            "max_sequence_length": int(sampler.empty_embeds.shape[0]), "dtype": dtype_name(sampler.dtype), "device": sampler.device.type,
            "samples": [gathered[request.name] for request in wanted],
        }  # fmt: skip
        if ranks.is_main():
            _merge(partial, record)
        ranks.barrier()
    ranks.barrier()
    return record


def mean_sharpness(record: dict[str, Any]) -> dict[str, float]:
    """The panel's mean over the samples, as ``sharpness/<metric>``."""
    panels = [sample["sharpness"] for sample in record["samples"]]
    return {f"sharpness/{name}": sum(panel[name] for panel in panels) / len(panels) for name in panels[0]}


def remove_older_frames(folder: Path, keep: Path) -> None:
    """Remove the raw frames of all validations but ``keep``: large, and only the newest are compared with an export."""
    for step_folder in step_folders(folder):
        if step_folder != keep:
            (step_folder / FRAMES_FILE).unlink(missing_ok=True)


def _sample_share(
    partial: Path, sampler: Sampler, wanted: Sequence[Request], fps: float, title: str
) -> list[dict[str, Any]]:
    world, rank = ranks.world_size(), ranks.rank()
    rounds = -(-len(wanted) // world)
    entries, latents, frames = [], {}, {}
    with progress(rounds, title) as bar:
        for turn in range(rounds):
            place = turn * world + rank
            # A rank without a prompt of its own repeats one: under ZeRO-3 all must take part in each forward pass.
            request = wanted[min(place, len(wanted) - 1)]
            denoised = sampler.latents(request)
            if place < len(wanted):
                video = sampler.decode(denoised)
                shown = (video * 255).round().to(torch.uint8).contiguous()
                write_video(partial / f"{request.name}.mp4", shown, fps)
                latents[request.name], frames[request.name] = denoised.contiguous(), shown
                image = {}
                if request.image is not None:
                    image = {"image": f"{request.name}-image.png"}
                    Image.fromarray(request.image.numpy()).save(partial / image["image"])
                entries.append(
                    {
                        "name": request.name, "id": request.prompt.id, "text": request.prompt.text, "seed": request.seed,
                        "video": f"{request.name}.mp4", "sharpness": measure(video), **image,
                    }
                )  # fmt: skip
            bar.advance()
    save_file(latents, partial / f"latents-{rank}.part")
    save_file(frames, partial / f"frames-{rank}.part")
    ranks.barrier()
    return entries


def _merge(partial: Path, record: dict[str, Any]) -> None:
    """One file of latents, one of frames, one sheet, one record. The manifest is made when the folder is published."""
    for kind, final in (("latents", LATENTS_FILE), ("frames", FRAMES_FILE)):
        parts = sorted(partial.glob(f"{kind}-*.part"))
        merged = {name: tensor for part in parts for name, tensor in load_file(part).items()}
        save_file(merged, partial / final)
        for part in parts:
            part.unlink()
        if kind == "frames":
            shown = {sample["text"]: merged[sample["name"]] for sample in record["samples"]}
            contact_sheet(shown, SHEET_COLUMNS).save(partial / "contact.png")
    write_json(partial / SAMPLES_RECORD, record)
