"""Everything a plan says of one config, gathered; nothing is loaded, and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cogflow.config.config import Config
from cogflow.config.deepspeed_section import sequence_problems
from cogflow.config.problems import fail
from cogflow.config.train_settings import TrainStage
from cogflow.data import buckets
from cogflow.files.paths import run_folder
from cogflow.models.family import MODEL_SPECS
from cogflow.planning import (
    clip_counts,
    disk,
    fitting,
    flops,
    goodput,
    gpu_layout,
    memory,
    pace,
    traffic,
    transformer_size,
)
from cogflow.planning.clip_counts import Clips
from cogflow.planning.disk import Disk
from cogflow.planning.flops import ForwardFlops, StepFlops
from cogflow.planning.goodput import Goodput
from cogflow.planning.gpu_layout import GpuLayout
from cogflow.planning.memory import Memory, Sampling
from cogflow.planning.pace import Pace
from cogflow.planning.traffic import Traffic
from cogflow.planning.transformer_size import Tokens, TransformerSize
from cogflow.runtime import ranks

REACHED = 0.8
"""Share of its data sheet that a GPU reaches on large matrix products: 790 of an H200's 989 TFLOP/s."""

USED = 0.54
"""Share of that which training reaches, with attention, norms and the update: 428 TFLOP/s of CogVideoX-5B on an H200 (docs/benchmarks.md);
assumed of other GPUs, until ``stage.plan_tflops`` says what was measured."""

PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "A6000": 155,
    "4090": 165,
}
"""TFLOP/s of bf16 without sparsity, from the data sheets."""

GPU_BYTES = 80e9
"""Of a GPU to plan for, where none is here and none is named."""


@dataclass(frozen=True)
class Device:
    """The GPU that is planned for: bytes of its memory and of its machine's, achieved TFLOP/s, and where these figures come from."""

    memory: float
    host: float | None
    tflops: float
    memory_source: str
    tflops_source: str


@dataclass(frozen=True)
class Plan:
    """Figures of one training; operations are those of one optimizer step of one GPU, seconds are without communication."""

    config: Config[TrainStage]
    stage: TrainStage
    shape: TransformerSize
    model_source: str
    dtype: str
    tokens: Tokens
    device: Device
    setting: GpuLayout
    sampling: Sampling | None
    gpu: Memory
    host: Memory
    forward: ForwardFlops
    sample: StepFlops
    traffic: Traffic
    disk: Disk
    clips: Clips
    prompts: int
    prompts_source: str
    encoder: int

    @property
    def clips_per_step(self) -> int:
        return self.setting.clips

    @property
    def flops(self) -> float:
        return self.sample.total * self.setting.batch * self.setting.accumulation / self.setting.sequence

    @property
    def seconds(self) -> float:
        return self.flops / (self.device.tflops * 1e12)

    @property
    def samples(self) -> int:
        """Videos of one validation, over all GPUs."""
        return self.prompts * len(self.config.sampling.seeds)

    @property
    def validation_flops(self) -> float:
        """Of one validation, all GPUs together; the autoencoder is not counted."""
        return self.samples * self.config.sampling.steps * self.passes * self.forward.total

    @property
    def passes(self) -> int:
        return 2 if self.config.sampling.guidance_scale > 1 else 1

    @property
    def validation_seconds(self) -> float:
        """Every GPU samples its share, one clip at a time; who has none repeats one."""
        turns = -(-self.samples // self.setting.gpus)
        return turns * self.config.sampling.steps * self.passes * self.forward.total / (self.device.tflops * 1e12)

    @property
    def pace(self) -> Pace:
        """Of one step, with the communication that is not hidden."""
        return pace.pace(self.shape, self.tokens, self.setting, self.device.tflops)

    @property
    def goodput(self) -> Goodput:
        """What saves, validations and interruptions leave of the run."""
        stage, layout = self.stage, self.setting
        return Goodput(
            steps=stage.steps,
            step=self.pace.step,
            save=goodput.save_seconds(self.shape, layout, self.disk.checkpoint, stage.plan_disk_gb * 1e9),
            every=stage.save_every,
            validation=self.validation_seconds,
            sampled=stage.sample_every,
            mtbf=stage.plan_mtbf_hours * 3600 / layout.gpus,
            restart=stage.plan_restart_minutes * 60,
        )

    def misfits(self) -> list[str]:
        """What does not fit, one line each."""
        found = []
        if self.gpu.peak > self.device.memory:
            found.append(
                f"{self.gpu.peak / 1e9:.1f} GB on each GPU ({self.gpu.worst}), {self.device.memory / 1e9:.1f} GB are there "
                f"({self.device.memory_source})"
            )
        if self.device.host is not None and self.host.peak > self.device.host:
            found.append(
                f"{self.host.peak / 1e9:.1f} GB of host memory on each machine ({self.host.worst}), {self.device.host / 1e9:.1f} GB are "
                "there"
            )
        return found


def plan(config: Config[TrainStage]) -> Plan:
    """The plan of ``config``, for the GPUs that it names, else for those that are here."""
    stage = config.stage
    run = run_folder(config.run)
    own, model_source = transformer_size.of_model(config.model, stage.freeze)
    gpus = stage.plan_gpus or ranks.world_size()
    fail(list(sequence_problems(config, gpus, own.heads)), "stage.plan_gpus says for how many GPUs to plan.")
    # Of buckets the largest: its step needs most memory, and all are counted as if they were of its size.
    tokens = max(
        (transformer_size.tokens(own, *size) for size in buckets.sizes(config.data)), key=lambda found: found.total
    )
    dtype = dtype_of(config)
    layout = gpu_layout.of_config(config, dtype, gpus, local_gpus(stage))
    count, prompts_source = clip_counts.prompts(config)
    sampling = sampling_of(config) if stage.sample_every else None
    encoder = 0 if config.model.name == "tiny" or sampling is None else memory.ENCODER
    gpu = device(stage)
    if fitting.asked(layout):
        layout = fitting.fitted(own, tokens, layout, sampling, gpu.memory, encoder=encoder)
    return Plan(
        config=config,
        stage=stage,
        shape=own,
        model_source=model_source,
        dtype=dtype,
        tokens=tokens,
        device=gpu,
        setting=layout,
        sampling=sampling,
        gpu=memory.gpu(own, tokens, layout, sampling, encoder=encoder),
        host=memory.host(own, layout, validates=sampling is not None, encoder=encoder),
        forward=flops.forward(own, tokens),
        sample=flops.step(own, tokens, layout.kept(own.layers)),
        traffic=traffic.traffic(own, tokens, layout),
        disk=Disk(*disk.checkpoint(own, layout), disk.at_once(stage), disk.weights_alone(stage), disk.free(run)),
        clips=clip_counts.clips(config, run),
        prompts=count,
        prompts_source=prompts_source,
        encoder=encoder,
    )


def kept(config: Config[TrainStage]) -> Mapping[str, int] | None:
    """Blocks by what they keep of their activations, where the settings leave it to the memory there is; else ``None``."""
    deepspeed = config.deepspeed
    if not deepspeed.activation_checkpointing or (
        deepspeed.checkpoint_every_block and deepspeed.checkpoint_keep != "auto"
    ):
        return None
    made = plan(config)
    return made.setting.kept(made.shape.layers)


def dtype_of(config: Config[TrainStage]) -> str:
    """As training will choose it; a plan for GPUs takes the family's also where no GPU is."""
    if config.model.dtype != "auto":
        return config.model.dtype
    on_cpu = config.model.name == "tiny" and not torch.cuda.is_available()
    return "fp32" if on_cpu or config.model.name not in MODEL_SPECS else MODEL_SPECS[config.model.name].dtype


def sampling_of(config: Config[TrainStage]) -> Sampling:
    """How a validation of ``config`` samples and decodes."""
    wanted, data_ = config.sampling, config.data
    size = 4 if wanted.vae_dtype == "auto" else gpu_layout.BYTES[wanted.vae_dtype]
    return Sampling(
        data_.frames, data_.height, data_.width, 2 if wanted.guidance_scale > 1 else 1, size, wanted.vae_tiling
    )


def local_gpus(stage: TrainStage) -> int | None:
    """Processes of this machine where torchrun says so and no other number of GPUs is planned for."""
    local = os.environ.get("LOCAL_WORLD_SIZE")
    return int(local) if local and not stage.plan_gpus else None


def device(stage: TrainStage) -> Device:
    """What the settings say, else the GPU that is here, else an H200's speed and the memory of a common GPU."""
    here = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    if stage.plan_memory_gb:
        size, size_source = stage.plan_memory_gb * 1e9, "stage.plan_memory_gb"
    elif here is not None:
        size, size_source = float(here.total_memory), here.name
    else:
        size, size_source = GPU_BYTES, "assumed; give stage.plan_memory_gb"
    if stage.plan_tflops:
        speed, speed_source = stage.plan_tflops, "stage.plan_tflops"
    else:
        name = here.name if here is not None else "H200"
        known = next((key for key in PEAKS if key in name), "H200")
        speed, speed_source = (
            PEAKS[known] * REACHED * USED,
            f"assumed: {USED:.0%} of what large products reach on {known}",
        )
    host = stage.plan_host_gb * 1e9 if stage.plan_host_gb else host_bytes() if here is not None else None
    return Device(size, host, speed, size_source, speed_source)


def host_bytes() -> float | None:
    """Memory of this machine."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):
        return None
