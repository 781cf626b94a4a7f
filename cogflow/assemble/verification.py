"""Verify an assembled folder: sample it in a fresh process with diffusers alone and compare with the run's own
samples.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cogflow.artifacts.run_layout import MODEL_INDEX, RunLayout
from cogflow.assemble.components import PipelineComponent
from cogflow.assemble.expectations import family_of
from cogflow.config.config import AnyConfig
from cogflow.errors import QualityGateError, format_list
from cogflow.records.ladder_records import ToleranceRecord
from cogflow.records.pipeline_records import PipelineSampling, VerifiedSample, VerifyRecord
from cogflow.records.sample_records import SampleRecord, SamplesRecord
from cogflow.sampling.noise import latent_frames, noise_for, step_generator
from cogflow.sampling.sample_record import FRAMES_FILE, newest_samples, read_sample_record
from cogflow.sharpness.psnr import psnr_of_error
from cogflow.weights.safetensors_file import save_tensors
from cogflow.weights.tensor_source import WeightsFolder, contained_file, read_json, weights_fingerprint

SCRIPT = Path(__file__).with_name("fresh_process.py")
IMAGE_TO_VIDEO = "CogVideoXImageToVideoPipeline"
TOLERANCES = {"fp32": ToleranceRecord(2, 50.0), "fp16": ToleranceRecord(255, 35.0), "bf16": ToleranceRecord(255, 30.0)}
"""Tolerance by the coarsest dtype that is involved.

fp32: the same sums in another order, so bytes may round the other way (tiny model: 95 dB and above). In 16 bits the
plain pipeline also decodes in that dtype, and differences grow with the steps and the depth: the tiny model gives 48
dB (bf16) and 58 dB (fp16) against fp32. In 16 bits a wrong scaling factor leaves 17 dB, but a wrong SNR shift, spacing
or zero-SNR rescaling 37 to 40 dB: the check of the configs finds those.
"""

COARSENESS = ("fp32", "fp16", "bf16")
PUBLISHED_STEPS, PUBLISHED_GUIDANCE_SCALE = 50, 6.0
"""Sampling settings of the family's model cards, which also use dynamic CFG."""


@dataclass(frozen=True)
class Reference:
    """A run's newest samples: their folder and their ``samples.json``."""

    folder: Path
    record: SamplesRecord

    @property
    def run(self) -> Path:
        return self.folder.parent.parent

    def frames(self) -> dict[str, torch.Tensor]:
        """Return uint8 frames ``[T, H, W, 3]`` by sample name."""
        return load_file(self.folder / FRAMES_FILE)


@dataclass(frozen=True)
class Comparison:
    """Samples of the assembled folder beside the reference's.

    ``found`` and ``expected``: uint8 frames ``[T, H, W, 3]`` by sample name; ``dtype``: the coarsest one involved;
    ``failed``: whether a sample differs by more than ``tolerance``.
    """

    found: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    samples: list[VerifiedSample]
    tolerance: ToleranceRecord
    dtype: str
    failed: bool


def find_reference(runs: Iterable[Path], transformer: PipelineComponent) -> tuple[Reference | None, str]:
    """Return the newest samples of the first of ``runs`` that were made with the transformer's weights.

    Returns ``None`` and the reason when there are none.
    """
    reasons: list[str] = []
    hashes: set[str] = set()
    for run in runs:
        folder = newest_samples(RunLayout(run).samples)
        if folder is None or not (folder / FRAMES_FILE).is_file():
            reasons.append(f"{run} has no samples with raw frames")
            continue
        record = read_sample_record(folder)
        if record.sampling.sampler != "default":
            sampler = f"sampling.sampler={record.sampling.sampler}"
            reasons.append(f"{folder} was sampled with {sampler}, not with the pipeline's own scheduler")
            continue
        hashes = hashes or _weight_hashes(transformer)
        if record.weights_sha256 in hashes:
            return Reference(folder, record), ""
        reasons.append(f"{folder} was sampled with other weights ({record.weights} of step {record.step})")
    return None, "; ".join(dict.fromkeys(reasons)) or "there is no run to compare with"


def _weight_hashes(transformer: PipelineComponent) -> set[str]:
    """Return the hashes of the transformer's weights before and after its export."""
    training = transformer.training
    known = {training.source_weights_sha256, training.weights_sha256} - {None}
    return {str(sha256) for sha256 in known} or {weights_fingerprint(WeightsFolder(transformer.folder).items())}


def sampling_settings(
    config: AnyConfig, reference: Reference | None, transformer: PipelineComponent
) -> PipelineSampling:
    """Return how to sample the pipeline: as the reference was, else as its family is published, else as ``config``
    says.
    """
    length = transformer.settings.get("max_text_seq_length")
    if reference is not None:
        record = reference.record
        return PipelineSampling(
            height=record.height,
            width=record.width,
            frames=record.frames,
            fps=record.fps,
            dtype=record.dtype,
            max_sequence_length=record.max_sequence_length,
            text=record.samples[0].text,
            origin=str(reference.folder),
            **asdict(record.sampling),
        )
    trained_in = transformer.training.trained_with and transformer.training.trained_with.dtype
    family = family_of(transformer)
    if family is not None:
        return PipelineSampling(
            height=family.height,
            width=family.width,
            frames=family.frames,
            fps=family.fps,
            dtype=trained_in or family.dtype,
            steps=PUBLISHED_STEPS,
            guidance_scale=PUBLISHED_GUIDANCE_SCALE,
            use_dynamic_cfg=True,
            max_sequence_length=length,
            origin=f"the facts of {family.name}",
        )
    return PipelineSampling(
        height=config.data.height,
        width=config.data.width,
        frames=config.data.frames,
        fps=config.data.fps,
        dtype=trained_in or config.model.dtype,
        steps=config.sampling.steps,
        guidance_scale=config.sampling.guidance_scale,
        use_dynamic_cfg=config.sampling.use_dynamic_cfg,
        max_sequence_length=length,
        origin="this command",
    )


def verify(
    folder: Path,
    reference: Reference,
    export_dtype: str | None,
    on_compared: Callable[[Comparison], None] | None = None,
) -> VerifyRecord:
    """Sample ``folder`` as ``reference`` was sampled, and compare the frames.

    ``on_compared`` is called with the comparison before an error is raised. Raises :class:`QualityGateError` when the
    folder does not load or run with diffusers alone, or gives other frames.
    """
    record, began = reference.record, time.monotonic()
    if record.device == "cuda" and not torch.cuda.is_available():
        reason = f"{reference.folder} was sampled on a GPU and there is none here"
        return VerifyRecord("skipped", reason=reason)
    if _pipeline_class(folder) == IMAGE_TO_VIDEO and not all(sample.image for sample in record.samples):
        reason = f"{reference.folder} names no image for some prompts, and image to video starts from an image"
        return VerifyRecord("skipped", reason=reason)
    found = sample_in_fresh_process(folder, record, reference.folder)
    comparison = _compare(found, reference, export_dtype)
    if on_compared is not None:
        on_compared(comparison)
    if comparison.failed:
        save_tensors(found, folder / f"verify-{FRAMES_FILE}")
        raise _other_frames(reference, comparison)
    return VerifyRecord(
        "passed",
        samples_of=str(reference.folder.absolute()),
        step=record.step,
        dtype=comparison.dtype,
        allowed=comparison.tolerance,
        samples=comparison.samples,
        seconds=round(time.monotonic() - began, 1),
    )


def _compare(found: dict[str, torch.Tensor], reference: Reference, export_dtype: str | None) -> Comparison:
    expected = reference.frames()
    dtypes = [name for name in (reference.record.dtype, export_dtype) if name in COARSENESS]
    dtype = max(dtypes, key=COARSENESS.index)
    samples = [sample_difference(name, found.get(name), frames) for name, frames in sorted(expected.items())]
    failed = any(_exceeds(sample, TOLERANCES[dtype]) for sample in samples)
    return Comparison(found, expected, samples, TOLERANCES[dtype], dtype, failed)


def _exceeds(sample: VerifiedSample, tolerance: ToleranceRecord) -> bool:
    return sample.psnr < tolerance.psnr or sample.max_difference > tolerance.max_difference


def _other_frames(reference: Reference, comparison: Comparison) -> QualityGateError:
    tolerance = comparison.tolerance
    different = [sample for sample in comparison.samples if _exceeds(sample, tolerance)]
    lines = [
        f"{sample.name}: PSNR {sample.psnr:.1f} dB, largest difference {sample.max_difference}/255"
        for sample in different
    ]
    return QualityGateError(
        f"The assembled pipeline does not give the videos of {reference.folder}, "
        f"{len(different)} of {len(comparison.samples)} differ:\n{format_list(lines)}\n"
        f"  allowed in {comparison.dtype}: PSNR {tolerance.psnr:.0f} dB or more, "
        f"differences up to {tolerance.max_difference}/255",
        "Weights, prompts and noise are the same, so a component or a setting differs from the run's.",
    )


def sample_difference(name: str, found: torch.Tensor | None, expected: torch.Tensor) -> VerifiedSample:
    """Return the difference of two uint8 clips. A missing clip and a clip of another shape differ by 0 dB and 255."""
    if found is None or found.shape != expected.shape:
        return VerifiedSample(name, 0.0, 255)
    gap = (found.int() - expected.int()).abs()
    error = float(gap.double().square().mean())
    return VerifiedSample(name, round(psnr_of_error(error / 255**2), 3), int(gap.max()))


def sample_in_fresh_process(folder: Path, record: SamplesRecord, images: Path | None = None) -> dict[str, torch.Tensor]:
    """Return uint8 frames ``[T, H, W, 3]`` by sample name, from ``folder`` in a process that imports only diffusers.

    ``record``: samples.json of the samples to repeat. ``images``: the folder of the images that the record names.
    """
    with tempfile.TemporaryDirectory(prefix="cogflow-verify-") as temporary:
        work = Path(temporary)
        # init_noise_sigma is 1 for CogVideoX's schedulers: the noise is the initial latents.
        shape = _latent_shape(folder, record)
        save_tensors(
            {_name(sample): noise_for(sample.seed, sample.id, shape) for sample in record.samples},
            work / "noise.safetensors",
        )
        request = _request(folder, record, images, work)
        (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
        _run_script(work)
        return load_file(work / FRAMES_FILE)


def _name(sample: SampleRecord) -> str:
    return f"{sample.id}-seed{sample.seed}"


def _latent_shape(folder: Path, record: SamplesRecord) -> tuple[int, int, int, int, int]:
    """Return ``[1, latent frames, channels, height / 8, width / 8]``."""
    vae = read_json(folder / "vae" / "config.json")
    transformer = read_json(folder / "transformer" / "config.json")
    ratio = int(vae.get("temporal_compression_ratio", 4))
    frames, _ = latent_frames(record.frames, ratio, transformer.get("patch_size_t"))
    return 1, frames, int(vae.get("latent_channels", 16)), record.height // 8, record.width // 8


def _request(folder: Path, record: SamplesRecord, images: Path | None, work: Path) -> dict[str, Any]:
    """Return the request file of :mod:`cogflow.assemble.fresh_process`."""
    samples = [
        {
            "name": _name(sample),
            "text": sample.text,
            "seed": step_generator(sample.seed, sample.id).initial_seed(),
            "image": str(contained_file(images, sample.image).absolute()) if images and sample.image else None,
        }
        for sample in record.samples
    ]
    call = {
        "num_inference_steps": record.sampling.steps,
        "guidance_scale": record.sampling.guidance_scale,
        "use_dynamic_cfg": record.sampling.use_dynamic_cfg,
        "num_frames": record.frames,
        "height": record.height,
        "width": record.width,
        "max_sequence_length": record.max_sequence_length,
    }
    return {
        "folder": str(folder.absolute()),
        "pipeline": _pipeline_class(folder),
        "dtype": record.dtype,
        "device": record.device,
        "noise": str(work / "noise.safetensors"),
        "frames": str(work / FRAMES_FILE),
        "samples": samples,
        "call": call,
    }


def _pipeline_class(folder: Path) -> str:
    return str(read_json(folder / MODEL_INDEX).get("_class_name"))


def _run_script(work: Path) -> None:
    """Run the script on ``work/request.json``. ``-I``: neither PYTHONPATH nor the working folder can make cogflow
    importable.
    """
    command = [sys.executable, "-I", str(SCRIPT), str(work / "request.json")]
    # The script is one process, also when this process is one of several ranks.
    distributed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in distributed} | {"HF_HUB_OFFLINE": "1"}
    with (work / "errors.txt").open("w", encoding="utf-8") as errors:
        ended = subprocess.run(command, env=environment, stderr=errors, check=False)
    if ended.returncode != 0:
        lines = (work / "errors.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise QualityGateError(
            "The assembled pipeline does not load or run with diffusers alone "
            f"(exit code {ended.returncode}):\n{format_list(lines[-5:])}",
            "The last lines of the process's output are above. Load the components one by one to find the wrong one.",
        )
