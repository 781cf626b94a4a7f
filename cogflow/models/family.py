"""The facts that distinguish the models of the CogVideoX family.

Sources: the SAT yaml files and the converter of zai-org/CogVideo, the model cards, and diffusers' configs. A
checkpoint or a yaml that disagrees with this table takes precedence.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModelSpec:
    """The facts of one model.

    Sizes are in frames and pixels; ``text_tokens`` is the length to which captions are padded.
    """

    name: str
    layers: int
    heads: int
    head_dim: int
    in_channels: int
    patch_size_t: int | None
    rotary: bool
    learned_positions: bool
    ofs_embed_dim: int | None
    text_tokens: int
    text_width: int
    frames: int
    height: int
    width: int
    fps: int
    dtype: str
    scaling_factor: float
    invert_scale_latents: bool
    snr_shift_scale: float
    patch_size: int = 2
    latent_channels: int = 16

    @property
    def image_to_video(self) -> bool:
        """True when the transformer takes the latents of an image beside the noised latents."""
        return self.in_channels == 2 * self.latent_channels

    def scheduler_config(self) -> dict[str, Any]:
        """Return the keyword arguments of ``CogVideoXDDIMScheduler`` and ``CogVideoXDPMScheduler``."""
        return {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": True,
            "steps_offset": 0,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "snr_shift_scale": self.snr_shift_scale,
            "timestep_spacing": "trailing",
        }


_5B = ModelSpec(
    name="cogvideox-5b",
    layers=42,
    heads=48,
    head_dim=64,
    in_channels=16,
    patch_size_t=None,
    rotary=True,
    learned_positions=False,
    ofs_embed_dim=None,
    text_tokens=226,
    text_width=4096,
    frames=49,
    height=480,
    width=720,
    fps=8,
    dtype="bf16",
    scaling_factor=0.7,
    invert_scale_latents=False,
    snr_shift_scale=1.0,
)


def _like_5b(**changes: Any) -> ModelSpec:
    return ModelSpec(**{**asdict(_5B), **changes})


_1_5 = {
    "patch_size_t": 2,
    "text_tokens": 224,
    "frames": 81,
    "height": 768,
    "width": 1360,
    "fps": 16,
    "invert_scale_latents": True,
}

MODEL_SPECS: dict[str, ModelSpec] = {
    member.name: member
    for member in (
        _like_5b(
            name="tiny",
            layers=5,
            heads=6,
            head_dim=32,
            text_tokens=32,
            text_width=64,
            frames=9,
            height=64,
            width=96,
            dtype="bf16",
        ),
        _like_5b(
            name="cogvideox-2b",
            layers=30,
            heads=30,
            rotary=False,
            dtype="fp16",
            scaling_factor=1.15258426,
            snr_shift_scale=3.0,
        ),
        _5B,
        _like_5b(name="cogvideox-5b-i2v", in_channels=32, learned_positions=True),
        _like_5b(name="cogvideox1.5-5b", **_1_5),
        _like_5b(name="cogvideox1.5-5b-i2v", in_channels=32, ofs_embed_dim=512, **_1_5),
    )
}
