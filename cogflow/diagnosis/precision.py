"""Step 5, precision: run each component in bf16 and fp16 against fp32, and measure how large its activations are.

fp16 overflows at 65504. Each component runs on one input: the text encoder on a caption, the transformer on a noisy
clip, the VAE on a clip's latents.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import AutoTokenizer, T5EncoderModel

from cogflow.artifacts.run_layout import RunLayout
from cogflow.assemble.components import STEMS
from cogflow.config.data_section import DataConfig
from cogflow.data.encode import encode_frames
from cogflow.data.latent_cache import LatentCache
from cogflow.data.shapes import draw, scenes
from cogflow.diagnosis.config_differences import dtype_of
from cogflow.diagnosis.diagnosis_input import DiagnosisInput
from cogflow.diagnosis.finding import DiagnosisFinding, StepResult
from cogflow.files.record_io import JsonValue
from cogflow.ladder.schedule_probe import predict_velocity
from cogflow.models.loading import DTYPES, SAFETENSORS_ONLY, encode_prompts, use_onednn_convolutions
from cogflow.models.transformer_inputs import pad_latent_frames
from cogflow.records.cache_records import CacheIndex
from cogflow.sampling.noise import noise_for
from cogflow.weights.tensor_source import WeightsFolder

FP16_MAX = 65504.0
MAX_ERROR = 0.1
"""Root mean square of the error, divided by that of the output, above which a dtype counts as too coarse.

On the tiny model bf16 gives 0.4 to 0.6 %, fp16 0.04 to 0.1 %.
"""

MAX_PARAMETERS_ON_CPU = 1.5e9
"""Larger components are not run on a CPU, which would hold them in fp32 and in 16 bits."""

NOISE_LEVEL, TIMESTEP = 0.5, 500
"""sqrt(alpha_bar) and timestep of the transformer's input: about half signal and half noise."""

HALF_DTYPES = {"float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class ProbeClips:
    """Latents ``[channels, frames, h, w]``, not scaled, and captions of a few clips."""

    latents: list[torch.Tensor]
    captions: list[str]


def cached_clips(runs: Sequence[Path | None], most: int) -> ProbeClips | None:
    """Return up to ``most`` prepared clips of the first of ``runs`` that has any, or ``None``."""
    for run in runs:
        if run is None or not (RunLayout(run).cache / CacheIndex.file_name).is_file():
            continue
        cache = LatentCache(RunLayout(run).cache)
        chosen = (cache.holdout or cache.train)[:most]
        return ProbeClips([cache.entry(index).mean for index in chosen], [cache.texts[index] for index in chosen])
    return None


def drawn_clips(vae: Any, data: DataConfig, count: int) -> ProbeClips:
    """Return drawn clips, encoded by ``vae``, for pipelines without a run."""
    drawn = list(scenes(count, seed=5))
    frames = [torch.from_numpy(draw(scene, data.frames, data.height, data.width)) for scene in drawn]
    return ProbeClips([encode_frames(vae, clip)[0] for clip in frames], [scene.caption for scene in drawn])


@dataclass(frozen=True)
class Probe:
    """A component and its input.

    ``load()`` returns the component in fp32; ``run(model, dtype)`` returns its output; ``stored``: dtype of its file.
    """

    name: str
    parameters: int
    load: Callable[[], Any]
    run: Callable[[Any, torch.dtype], torch.Tensor]
    stored: str | None


def make_probes(
    subject: DiagnosisInput, clips: ProbeClips, embeds: torch.Tensor, device: torch.device, names: set[str]
) -> list[Probe]:
    """Return the probes of the components in ``names``. ``embeds``: embedding of the first caption ``[tokens,
    width]``.
    """
    transformer, vae = subject.parts["transformer"], subject.parts["vae"]
    latents, caption = clips.latents[0], clips.captions[0]
    factor, patch = float(vae.settings.get("scaling_factor") or 1.0), transformer.settings.get("patch_size_t") or 1
    scaled = factor * pad_latent_frames(latents.float().transpose(0, 1), patch)[None].to(device)
    noise = noise_for(0, "precision", scaled.shape).to(device)
    noisy = NOISE_LEVEL * scaled + math.sqrt(1 - NOISE_LEVEL**2) * noise

    def encode(model: Any, dtype: torch.dtype) -> torch.Tensor:
        folder = subject.parts["tokenizer"].folder
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return encode_prompts(tokenizer, model, [caption], embeds.shape[0])

    def denoise(model: Any, dtype: torch.dtype) -> torch.Tensor:
        return predict_velocity(model, noisy, embeds, TIMESTEP, dtype)

    def decode(model: Any, dtype: torch.dtype) -> torch.Tensor:
        output: torch.Tensor = model.decode(latents[None].to(device, dtype)).sample
        return output

    runs = {"text_encoder": encode, "transformer": denoise, "vae": decode}
    if transformer.from_image:
        del runs["transformer"]
    return [
        Probe(name, _parameters(subject, name), _loader(subject, name, device), run, dtype_of(subject.parts[name]))
        for name, run in runs.items()
        if name in names
    ]


def _parameters(subject: DiagnosisInput, name: str) -> int:
    weights = WeightsFolder(subject.parts[name].folder, STEMS[name])
    return sum(math.prod(info.shape) for info in weights.tensors.values())


def _loader(subject: DiagnosisInput, name: str, device: torch.device) -> Callable[[], Any]:
    """Return a function that loads the component in fp32."""
    folder = subject.parts[name].folder

    def load() -> Any:
        if name == "text_encoder":
            model = T5EncoderModel.from_pretrained(folder, dtype=torch.float32, **SAFETENSORS_ONLY)
        elif name == "transformer":
            model = CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32, **SAFETENSORS_ONLY)
        else:
            vae = AutoencoderKLCogVideoX.from_pretrained(folder, torch_dtype=torch.float32, **SAFETENSORS_ONLY)
            model = use_onednn_convolutions(vae)
        return model.to(device).eval().requires_grad_(False)

    return load


def compare_precision(probes: Sequence[Probe], rung: int, on_cpu: bool) -> StepResult:
    """Run every probe in fp32, bf16 and fp16.

    A finding names a component whose stored dtype, in which plain diffusers loads it, does not hold what it computes.
    """
    findings: list[DiagnosisFinding] = []
    lines: list[str] = []
    measurements: dict[str, JsonValue] = {}
    for probe in probes:
        if on_cpu and probe.parameters > MAX_PARAMETERS_ON_CPU:
            lines.append(f"{probe.name}: {probe.parameters / 1e9:.1f} billion parameters are not tried on a CPU")
            continue
        with torch.no_grad():
            result = measure_precision(probe)
        lines += result.lines
        measurements[probe.name] = result.measurements()
        error = result.errors.get(HALF_DTYPES.get(probe.stored or "", ""))
        if error is not None and error.too_coarse:
            findings.append(_too_coarse(probe, result, error, rung))
    return StepResult("precision", findings, lines, measurements)


@dataclass(frozen=True)
class DtypeError:
    """``error``: root mean square error divided by that of the fp32 output; ``finite``: share of finite values."""

    dtype: str
    error: float
    finite: float

    @property
    def too_coarse(self) -> bool:
        return self.finite < 1 or self.error > MAX_ERROR


@dataclass(frozen=True)
class PrecisionResult:
    """``peak``: largest magnitude of an activation, in the module ``where``; ``errors``: by dtype, where it runs."""

    peak: float
    where: str
    errors: dict[str, DtypeError]
    lines: list[str]

    def measurements(self) -> dict[str, JsonValue]:
        """Return the numbers for diagnosis.json."""
        errors = {name: {"error": round(one.error, 6), "finite": one.finite} for name, one in self.errors.items()}
        return {"largest_inside": self.peak, "where": self.where, **errors}


def measure_precision(probe: Probe) -> PrecisionResult:
    """Run one probe in fp32, bf16 and fp16."""
    model = probe.load()
    with largest_activations(model) as peaks:
        reference = probe.run(model, torch.float32).float()
    where, peak = max(peaks.items(), key=lambda item: item[1], default=("", 0.0))
    errors: dict[str, DtypeError] = {}
    lines = [f"{probe.name}: activations reach {peak:.3g} ({where}); fp16 ends at {FP16_MAX:.0f}"]
    for name in ("bf16", "fp16"):
        half = torch.nn.Module.to(copy.deepcopy(model), DTYPES[name])
        try:
            output = probe.run(half, DTYPES[name]).float()
        except RuntimeError as failure:  # the device has no kernel for this dtype
            lines.append(f"{probe.name} in {name}: {str(failure).splitlines()[0][:120]}")
            continue
        finite = float(output.isfinite().float().mean())
        gap = torch.where(output.isfinite(), output - reference, reference)
        error = math.sqrt(float(gap.square().mean()) / max(1e-12, float(reference.square().mean())))
        errors[name] = DtypeError(name, error, finite)
        non_finite = f", {1 - finite:.2%} of the values are not finite" if finite < 1 else ""
        lines.append(f"{probe.name} in {name}: differs by {error:.2%} from fp32's output{non_finite}")
    return PrecisionResult(peak, where, errors, lines)


def _too_coarse(probe: Probe, result: PrecisionResult, error: DtypeError, rung: int) -> DiagnosisFinding:
    why = f"It is stored in {error.dtype}, and its output in {error.dtype} differs by {error.error:.1%} from fp32's; "
    why += f"activations reach {result.peak:.3g}."
    return DiagnosisFinding(
        step="precision",
        component=probe.name,
        kind="overflow" if error.finite < 1 else "precision",
        name="dtype",
        candidate=error.dtype,
        reference="fp32",
        rung=rung,
        confidence=0.95,
        why=why,
    )


@contextmanager
def largest_activations(model: torch.nn.Module) -> Iterator[dict[str, float]]:
    """Yield a dict that gets the largest magnitude of each leaf module's output while the block runs."""
    peaks: dict[str, float] = {}

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def record(_module: Any, _input: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                peaks[name] = max(peaks.get(name, 0.0), float(tensor.abs().max()))

        return record

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()
