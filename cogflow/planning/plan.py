"""Compute the plan of one config. This module loads and writes nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.files.paths import run_folder
from cogflow.planning import goodput, run_size, step_time
from cogflow.planning.goodput import Goodput
from cogflow.planning.run_size import Clips, Disk
from cogflow.planning.step_time import Pace, Traffic
from cogflow.training import flops, gpu_memory
from cogflow.training.activation_memory import fit, memory_of_one_gpu, training_size
from cogflow.training.flops import ForwardFlops, StepFlops
from cogflow.training.gpu_layout import GpuLayout
from cogflow.training.gpu_memory import Memory, Sampling
from cogflow.training.transformer_size import Tokens, TransformerSize

REACHED = 0.8
"""Share of the data sheet's speed that a GPU reaches on large matrix products: 790 of 989 TFLOP/s on an H200."""

USED = 0.54
"""Share of that speed that training reaches, including attention, norms and the update.

Measured: 428 TFLOP/s with CogVideoX-5B on an H200 (docs/benchmarks.md). The plan assumes the same share for other GPUs
unless ``stage.plan_tflops`` gives a measured speed.
"""

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


@dataclass(frozen=True)
class Device:
    """The GPU that the plan is made for: its memory and its machine's in bytes, achieved TFLOP/s, and their sources."""

    memory: float
    host: float | None
    tflops: float
    memory_source: str
    tflops_source: str


@dataclass(frozen=True)
class Plan:
    """Forecast of one training. ``flops``: operations of one optimizer step on one GPU; ``seconds``: their time without
    communication."""

    config: Config[TrainStage]
    stage: TrainStage
    shape: TransformerSize
    model_source: str
    dtype: str
    tokens: Tokens
    device: Device
    layout: GpuLayout
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
        return self.layout.clips

    @property
    def flops(self) -> float:
        return self.sample.total * self.layout.batch * self.layout.accumulation / self.layout.sequence

    @property
    def seconds(self) -> float:
        return self.flops / (self.device.tflops * 1e12)

    @property
    def samples(self) -> int:
        """Videos of one validation, over all GPUs."""
        return self.prompts * len(self.config.sampling.seeds)

    @property
    def validation_flops(self) -> float:
        """Operations of one validation on all GPUs together, without the VAE."""
        return self.samples * self.config.sampling.steps * self.passes * self.forward.total

    @property
    def passes(self) -> int:
        return 2 if self.config.sampling.guidance_scale > 1 else 1

    @property
    def validation_seconds(self) -> float:
        """Seconds of one validation. Each GPU samples its share, one clip at a time; a GPU without a share repeats a
        clip."""
        turns = -(-self.samples // self.layout.gpus)
        return turns * self.config.sampling.steps * self.passes * self.forward.total / (self.device.tflops * 1e12)

    @property
    def pace(self) -> Pace:
        """Seconds of one step, including the communication that computation does not hide."""
        return step_time.pace(self.shape, self.tokens, self.layout, self.device.tflops)

    @property
    def goodput(self) -> Goodput:
        """Share of the run that is left for training steps after saves, validations and interruptions."""
        stage, layout = self.stage, self.layout
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
        """One line for each kind of memory that is too small."""
        found = []
        if self.gpu.peak > self.device.memory:
            found.append(
                f"each GPU needs {self.gpu.peak / 1e9:.1f} GB ({self.gpu.worst}) and has "
                f"{self.device.memory / 1e9:.1f} GB ({self.device.memory_source})"
            )
        if self.device.host is not None and self.host.peak > self.device.host:
            found.append(
                f"each machine needs {self.host.peak / 1e9:.1f} GB of host memory ({self.host.worst}) and has "
                f"{self.device.host / 1e9:.1f} GB"
            )
        return found


def plan(config: Config[TrainStage]) -> Plan:
    """Return the plan of ``config`` for the GPUs that it names, by default for the GPUs of this machine."""
    stage = config.stage
    run = run_folder(config.run)
    size = training_size(config)
    prompts, prompts_source = run_size.prompts(config)
    gpu = device(stage)
    layout = fit(size, gpu.memory)
    return Plan(
        config=config,
        stage=stage,
        shape=size.shape,
        model_source=size.model_source,
        dtype=size.dtype,
        tokens=size.tokens,
        device=gpu,
        layout=layout,
        sampling=size.sampling,
        gpu=gpu_memory.gpu(size.shape, size.tokens, layout, size.sampling, encoder=size.encoder),
        host=gpu_memory.host(size.shape, layout, validates=size.sampling is not None, encoder=size.encoder),
        forward=flops.forward(size.shape, size.tokens),
        sample=flops.step(size.shape, size.tokens, layout.kept(size.shape.layers)),
        traffic=step_time.traffic(size.shape, size.tokens, layout),
        disk=run_size.disk(config, size.shape, layout, run),
        clips=run_size.clips(config, run),
        prompts=prompts,
        prompts_source=prompts_source,
        encoder=size.encoder,
    )


def device(stage: TrainStage) -> Device:
    """Return the GPU that the settings describe, else this machine's, else one with the speed of an H200 and 80 GB."""
    present = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    memory, memory_source = memory_of_one_gpu(stage)
    tflops, tflops_source = stage.plan_tflops, "stage.plan_tflops"
    if not tflops:
        name = present.name if present is not None else "H200"
        known = next((key for key in PEAKS if key in name), "H200")
        tflops = PEAKS[known] * REACHED * USED
        tflops_source = f"assumed: {USED:.0%} of what large products reach on {known}"
    host = None if present is None else host_bytes()
    if stage.plan_host_gb:
        host = stage.plan_host_gb * 1e9
    return Device(memory, host, tflops, memory_source, tflops_source)


def host_bytes() -> float | None:
    """Return the memory of this machine in bytes, ``None`` if it is unknown."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):
        return None
