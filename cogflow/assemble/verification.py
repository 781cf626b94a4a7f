"""Does the assembled folder give the run's own videos? Sampled in a fresh process with diffusers alone, compared frame by frame."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cogflow.artifacts.run_layout import MODEL_INDEX, RunLayout
from cogflow.assemble.components import PipelineComponent
from cogflow.errors import QualityGateError, format_list
from cogflow.sampling.noise import latent_frames, noise_for, step_generator
from cogflow.sampling.records import FRAMES, newest, read_record
from cogflow.weights.tensor_source import WeightsFolder, contained_file, weights_fingerprint

SCRIPT = Path(__file__).with_name("fresh_process.py")
FROM_IMAGE = "CogVideoXImageToVideoPipeline"
IDENTICAL = 100.0  # dB, instead of infinity


@dataclass(frozen=True)
class Tolerance:
    """What one sample may differ by: the largest difference of a value of 255, and the lowest PSNR in dB."""

    max_difference: int
    psnr: float


TOLERANCES = {"fp32": Tolerance(2, 50.0), "fp16": Tolerance(255, 35.0), "bf16": Tolerance(255, 30.0)}
"""By the coarsest dtype in play. fp32: the same sums in another order, so bytes may round the other way and no more (tiny model:
95 dB and above). In 16 bits the plain pipeline decodes in that dtype, too, and differences grow over steps and with the model: the
tiny one gives 48 dB (bf16) and 58 dB (fp16) against fp32, deeper ones need room. A wrong scaling factor leaves 17 dB there, but a
wrong SNR shift, spacing or zero-SNR rescaling 37 to 40: in 16 bits those are left to the check of the configs."""
COARSENESS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Reference:
    """A run's newest samples: their record, and uint8 frames ``[T, H, W, 3]`` by name."""

    folder: Path
    record: dict[str, Any]

    def frames(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / FRAMES)


def find_reference(runs: Iterable[Path], transformer: PipelineComponent) -> tuple[Reference | None, str]:
    """The newest samples of the first of ``runs`` that were made by these very weights; or ``None`` and the reason."""
    reasons = []
    hashes: set[str] = set()
    for run in runs:
        folder = newest(RunLayout(run).samples)
        if folder is None or not (folder / FRAMES).is_file():
            reasons.append(f"{run} holds no samples with raw frames")
            continue
        record = read_record(folder)
        sampler = record["sampling"].get("sampler", "default")
        if sampler != "default":
            reasons.append(f"{folder} was sampled with sampling.sampler={sampler}, not by the pipeline's own scheduler")
            continue
        if not hashes:
            known = {
                str(transformer.made[key])
                for key in ("source_weights_sha256", "weights_sha256")
                if key in transformer.made
            }
            hashes = known or {weights_fingerprint(WeightsFolder(transformer.folder).items())}
        if record.get("weights_sha256") in hashes:
            return Reference(folder, record), ""
        reasons.append(
            f"{folder} was sampled with other weights ({record.get('weights')} of step {record.get('step')})"
        )
    return None, "; ".join(dict.fromkeys(reasons)) or "there is no run to compare with"


Measured = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]], None]
"""Called with the folder's frames, the run's own, and the figures: before anything is raised."""


def verify(
    folder: Path, reference: Reference, export_dtype: str | None, measured: Measured | None = None
) -> dict[str, Any]:
    """Sample ``folder`` as ``reference`` was sampled and compare; returns what was found, with ``status`` passed or skipped.

    Raises :class:`QualityGateError` when the folder does not load or run with diffusers alone, or gives other frames.
    """
    record, began = reference.record, time.monotonic()
    if record["device"] == "cuda" and not torch.cuda.is_available():
        return {"status": "skipped", "reason": f"{reference.folder} was sampled on a GPU and there is none here"}
    if _class(folder) == FROM_IMAGE and not all(sample.get("image") for sample in record["samples"]):
        return {
            "status": "skipped",
            "reason": f"{reference.folder} names no image to each prompt, which image to video starts from",
        }
    expected = reference.frames()
    found = sample_afresh(folder, record, reference.folder)
    dtype = max((name for name in (record["dtype"], export_dtype) if name in COARSENESS), key=COARSENESS.index)
    tolerance = TOLERANCES[dtype]
    samples: list[dict[str, Any]] = [
        {"name": name, **difference(found.get(name), frames)} for name, frames in sorted(expected.items())
    ]
    bad = [s for s in samples if s["psnr"] < tolerance.psnr or s["max_difference"] > tolerance.max_difference]
    if measured is not None:
        allowed = {"max_difference": tolerance.max_difference, "psnr": tolerance.psnr}
        psnr = {sample["name"]: sample["psnr"] for sample in samples}
        measured(
            found,
            expected,
            {"psnr": psnr, "allowed": allowed, "failed": bool(bad), "dtype": dtype, "step": record.get("step")},
        )
    if bad:
        save_file(found, folder / f"verify-{FRAMES}")
        lines = [f"{s['name']}: PSNR {s['psnr']:.1f} dB, largest difference {s['max_difference']}/255" for s in bad]
        raise QualityGateError(
            f"The assembled pipeline does not give the videos of {reference.folder}, "
            f"{len(bad)} of {len(samples)} differ:\n{format_list(lines)}\n"
            f"  allowed in {dtype}: PSNR {tolerance.psnr:.0f} dB or more, differences up to {tolerance.max_difference}/255",
            "Same weights, prompts and noise, so a component or a setting is not what the run was trained and sampled with.",
        )
    return {
        "status": "passed",
        "samples_of": str(reference.folder.absolute()),
        "step": record.get("step"),
        "dtype": dtype,
        "allowed": {"max_difference": tolerance.max_difference, "psnr": tolerance.psnr},
        "samples": samples,
        "seconds": round(time.monotonic() - began, 1),
    }


def sample_afresh(folder: Path, record: Mapping[str, Any], images: Path | None = None) -> dict[str, torch.Tensor]:
    """uint8 frames ``[T, H, W, 3]`` by name, from ``folder`` in a process that has diffusers alone. ``images``: the folder in which the
    record's ``image`` of each sample lies, for image to video."""
    vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    channels, ratio = int(vae.get("latent_channels", 16)), int(vae.get("temporal_compression_ratio", 4))
    transformer = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    frames, _ = latent_frames(record["frames"], ratio, transformer.get("patch_size_t"))
    shape = (1, frames, channels, record["height"] // 8, record["width"] // 8)
    samples = [(f"{sample['id']}-seed{sample['seed']}", sample) for sample in record["samples"]]
    with tempfile.TemporaryDirectory(prefix="cogflow-verify-") as temporary:
        place = Path(temporary)
        # init_noise_sigma is 1 for CogVideoX's schedulers: the noise is the initial latents.
        save_file(
            {name: noise_for(sample["seed"], sample["id"], shape) for name, sample in samples},
            place / "noise.safetensors",
        )
        request = {
            "folder": str(folder.absolute()),
            "pipeline": _class(folder),
            "dtype": record["dtype"],
            "device": record["device"],
            "noise": str(place / "noise.safetensors"),
            "frames": str(place / FRAMES),
            "samples": [
                {
                    "name": name,
                    "text": sample["text"],
                    "seed": step_generator(sample["seed"], sample["id"]).initial_seed(),
                    "image": str(contained_file(images, sample["image"]).absolute())
                    if images and sample.get("image")
                    else None,
                }
                for name, sample in samples
            ],
            "call": {
                "num_inference_steps": record["sampling"]["steps"],
                "guidance_scale": record["sampling"]["guidance_scale"],
                "use_dynamic_cfg": record["sampling"]["use_dynamic_cfg"],
                "num_frames": record["frames"],
                "height": record["height"],
                "width": record["width"],
                "max_sequence_length": record["max_sequence_length"],
            },
        }
        (place / "request.json").write_text(json.dumps(request), encoding="utf-8")
        _run(place)
        return load_file(place / FRAMES)


def _class(folder: Path) -> str:
    """The pipeline's class by its model_index.json."""
    return str(json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))["_class_name"])


def difference(found: torch.Tensor | None, expected: torch.Tensor) -> dict[str, float]:
    """``psnr`` in dB (100 for equal frames) and ``max_difference`` of two uint8 clips. A missing clip or another shape is worst."""
    if found is None or found.shape != expected.shape:
        return {"psnr": 0.0, "max_difference": 255}
    gap = (found.int() - expected.int()).abs()
    error = float(gap.double().square().mean())
    psnr = IDENTICAL if error == 0 else min(IDENTICAL, 10 * math.log10(255**2 / error))
    return {"psnr": round(psnr, 3), "max_difference": int(gap.max())}


def _run(place: Path) -> None:
    """Run the script on ``place/request.json``. ``-I``: neither PYTHONPATH nor the working folder can bring cogflow in."""
    command = [sys.executable, "-I", str(SCRIPT), str(place / "request.json")]
    # It samples alone, whatever this process is part of.
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    with open(place / "errors.txt", "w", encoding="utf-8") as errors:
        ended = subprocess.run(command, env=kept | {"HF_HUB_OFFLINE": "1"}, stderr=errors, check=False)
    if ended.returncode != 0:
        lines = (place / "errors.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise QualityGateError(
            f"The assembled pipeline does not load or run with diffusers alone (exit code {ended.returncode}):\n{format_list(lines[-5:])}",
            "The components load one by one or not at all; the last lines of its output are above.",
        )
