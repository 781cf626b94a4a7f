"""Settings of sampling videos, in validations and in all stages that sample: ``sampling.*``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogflow.config.model_section import DTYPES
from cogflow.config.problems import Problem
from cogflow.config.setting import ValueRule, at_least, one_of, setting, within

if TYPE_CHECKING:
    from cogflow.config.config import AnyConfig

SAMPLERS = ("default", "dpm", "ddim", "sat_dpm", "sat_ddim")

SEEDS = ValueRule(
    "different, each 0 or more",
    lambda value: (
        None
        if value and len(set(value)) == len(value) and min(value) >= 0
        else "it should be different whole numbers from 0 up, such as [0]."
    ),
)


@dataclass(frozen=True)
class SamplingConfig:
    """``sampling.*``"""

    sampler: str = setting(
        "default",
        help="Sampler. default: the pipeline's own scheduler. sat_dpm and sat_ddim compute as CogVideo's SAT code.",
        rule=one_of(*SAMPLERS),
    )
    steps: int = setting(20, help="Denoising steps.", rule=within(1, 1000))
    guidance_scale: float = setting(6.0, help="Scale of classifier-free guidance. 1 turns it off.", rule=at_least(0))
    use_dynamic_cfg: bool = setting(
        True, help="Increase the guidance over the denoising steps, as CogVideoX's pipelines do."
    )
    seeds: list[int] = setting([0], help="Seeds; each prompt is sampled once per seed.", rule=SEEDS)
    prompts: str | None = setting(
        None,
        help="File of prompts: .txt with one prompt per line, or .jsonl with id and text. Default: captions of "
        "the clips.",
    )
    clip_model: str | None = setting(
        None,
        help="Folder of a CLIP model on disk; stage=sample then reports its scores, too. Nothing is downloaded.",
    )
    vae_dtype: str = setting(
        "auto",
        help="Dtype of the VAE that decodes samples. auto: the dtype it is loaded in (fp32).",
        rule=one_of(*DTYPES),
    )
    vae_tiling: bool = setting(
        False, help="Decode tile by tile: takes less memory, and leaves seams between the tiles."
    )
    roundtrip_clips: int = setting(
        8,
        help="Prepared clips that the VAE encodes and decodes, to measure the VAE reconstruction bound. 0: none.",
        rule=at_least(0),
    )


def check_sampling(config: AnyConfig) -> Iterator[Problem]:
    """Yield contradictions within ``sampling.*``."""
    sampling = config.sampling
    if sampling.sampler.startswith("sat_") and not 2 <= sampling.steps <= 999:
        yield Problem(
            f"sampling.steps={sampling.steps}: sampling.sampler={sampling.sampler} takes 2 to 999 steps, as SAT does.",
            ("sampling.steps", "sampling.sampler"),
        )
