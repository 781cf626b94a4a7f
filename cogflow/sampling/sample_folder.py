"""Write a folder of samples: videos, latents and frames for comparisons, and a record with the hash of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from cogflow.artifacts.run_layout import SAMPLES_RECORD, step_folders
from cogflow.data.video import write_video
from cogflow.files.publish import publish_folder
from cogflow.files.record_io import write_record
from cogflow.models.loading import dtype_name
from cogflow.records.sample_records import ClipMetrics, SampledWeights, SampleRecord, SamplesRecord
from cogflow.runtime import ranks
from cogflow.runtime.progress import progress
from cogflow.sampling.sample_record import FRAMES_FILE
from cogflow.sampling.sampler import Request, Sampler
from cogflow.sharpness.metrics import measure
from cogflow.tracking.contact_sheet import contact_sheet
from cogflow.weights.safetensors_file import save_tensors

LATENTS_FILE = "latents.safetensors"
SHEET_COLUMNS = 5


def write_samples(
    target: Path, sampler: Sampler, wanted: Sequence[Request], *, fps: float, weights: SampledWeights, title: str
) -> SamplesRecord:
    """Sample ``wanted`` over all ranks, publish the folder ``target``, and return its ``samples.json`` on every rank.

    ``title``: title of the progress bar. All ranks must call this. Each runs the same number of forward passes, which
    ZeRO-3 needs, whatever the number of prompts.
    """
    with contextlib.ExitStack() as stack:
        partial = ranks.broadcast(
            stack.enter_context(publish_folder(target, replace=True)) if ranks.is_main() else None
        )
        own = _sample_shard(partial, sampler, wanted, fps, title)
        sampler.finish()
        samples = {sample.name: sample for shard in ranks.gather(own) for sample in shard}
        record = SamplesRecord(
            step=weights.step,
            weights=weights.weights,
            source=weights.source,
            weights_sha256=weights.weights_sha256,
            sampling=sampler.describe(),
            height=sampler.height,
            width=sampler.width,
            frames=sampler.frames,
            fps=fps,
            max_sequence_length=int(sampler.empty_embeds.shape[0]),
            dtype=dtype_name(sampler.dtype),
            device=sampler.device.type,
            samples=[samples[request.name] for request in wanted],
        )
        if ranks.is_main():
            _merge(partial, record)
        ranks.barrier()
    ranks.barrier()
    return record


def mean_sharpness(record: SamplesRecord) -> dict[str, float]:
    """Return the mean of each metric over the samples, as ``sharpness/<metric>``."""
    clips = [sample.sharpness for sample in record.samples]
    return {f"sharpness/{name}": sum(clip[name] for clip in clips) / len(clips) for name in clips[0]}


def remove_older_frames(folder: Path, keep: Path) -> None:
    """Remove the raw frames of all validations but ``keep``.

    Raw frames are large, and an export is compared with the newest only.
    """
    for step_folder in step_folders(folder):
        if step_folder != keep:
            (step_folder / FRAMES_FILE).unlink(missing_ok=True)


def _sample_shard(
    partial: Path, sampler: Sampler, wanted: Sequence[Request], fps: float, title: str
) -> list[SampleRecord]:
    """Sample this rank's shard of ``wanted`` into ``partial``."""
    world, rank = ranks.world_size(), ranks.rank()
    rounds = -(-len(wanted) // world)
    samples, latents, frames = [], {}, {}
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
                samples.append(_describe_sample(partial, request, measure(video)))
            bar.advance()
    save_tensors(latents, partial / f"latents-{rank}.part")
    save_tensors(frames, partial / f"frames-{rank}.part")
    ranks.barrier()
    return samples


def _describe_sample(partial: Path, request: Request, metrics: ClipMetrics) -> SampleRecord:
    """Return the record of one sample, and write the image that it starts from, where there is one."""
    image = None
    if request.image is not None:
        image = f"{request.name}-image.png"
        Image.fromarray(request.image.numpy()).save(partial / image)
    prompt = request.prompt
    video = f"{request.name}.mp4"
    return SampleRecord(request.name, prompt.id, prompt.text, request.seed, video, metrics, image)


def _merge(partial: Path, record: SamplesRecord) -> None:
    """Merge the ranks' files into one of latents and one of frames, and write the contact sheet and the record."""
    for kind, final in (("latents", LATENTS_FILE), ("frames", FRAMES_FILE)):
        parts = sorted(partial.glob(f"{kind}-*.part"))
        merged = {name: tensor for part in parts for name, tensor in load_file(part).items()}
        save_tensors(merged, partial / final)
        for part in parts:
            part.unlink()
        if kind == "frames":
            shown = {sample.text: merged[sample.name] for sample in record.samples}
            contact_sheet(shown, SHEET_COLUMNS).save(partial / "contact.png")
    write_record(partial / SAMPLES_RECORD, record)
