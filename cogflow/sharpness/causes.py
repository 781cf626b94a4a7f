"""Likely causes of a finding, the likeliest first, by kind and by the rung of the ladder where it enters."""

from __future__ import annotations

RUNGS = {0: "source", 1: "clip", 2: "roundtrip", 3: "base", 4: "tuned", 5: "exported"}

_SCALE = "another scaling_factor than the VAE was made with"
_RATE = "learning rate too high"
_LONG = "trained too long on too few clips"
_EMA = "EMA weights that lag behind (ema_decay)"

_BY_RUNG: dict[int, dict[str, tuple[str, ...]]] = {
    0: {
        "soft": ("clips scaled up from a smaller size", "out of focus or heavily compressed sources"),
        "grainy": ("noisy or strongly compressed sources",),
        "artefacts": ("compression blocks in the sources",),
        "smeared": ("frames blended by a frame-rate conversion",),
        "identical": ("frames repeated by a frame-rate conversion",),
        "": ("the sources themselves",),
    },
    1: {
        "soft": ("clips scaled up: data.height and data.width are larger than the sources", "data.resize"),
        "smeared": ("data.fps higher than the sources' frame rate",),
        "identical": ("data.fps higher than the sources' frame rate", "a broken decoder"),
        "washed_out": ("limited range read as full range",),
        "hazy": ("limited range read as full range",),
        "": ("decoding, resizing or cropping in the loader",),
    },
    2: {
        "soft": ("VAE weights that do not belong to this model", "VAE precision (sampling.vae_dtype)", _SCALE, "tiling"),
        "washed_out": (_SCALE, "VAE weights that do not belong to this model"),
        "hazy": (_SCALE, "VAE weights that do not belong to this model"),
        "artefacts": (_SCALE, "tiling (sampling.vae_tiling)", "VAE precision (sampling.vae_dtype)"),
        "over_sharpened": (_SCALE,),
        "non_finite": ("an overflow of the VAE in fp16 (sampling.vae_dtype)",),
        "black": ("an overflow of the VAE in fp16 (sampling.vae_dtype)",),
        "": ("the VAE: weights, scaling_factor, precision, tiling",),
    },
    3: {
        "soft": ("another schedule than in training (snr_shift_scale)", "too few steps (sampling.steps)", "the base model itself"),
        "washed_out": (_SCALE, "another schedule than in training (snr_shift_scale, rescale_betas_zero_snr)"),
        "saturated": ("sampling.guidance_scale too high",),
        "over_sharpened": ("sampling.guidance_scale too high",),
        "non_finite": ("the dtype (model.dtype)",),
        "black": ("the dtype (model.dtype, sampling.vae_dtype)",),
        "": ("the schedule (snr_shift_scale, prediction_type, timestep_spacing)", "the dtype", "the base model itself"),
    },
    4: {
        "soft": (_RATE, "blurred or scaled-up clips among the data", _EMA, _LONG),
        "over_sharpened": (_RATE, "over-sharpened clips among the data", "latents prepared with " + _SCALE),
        "washed_out": ("latents prepared with " + _SCALE, _RATE, _EMA),
        "hazy": ("latents prepared with " + _SCALE, "hazy clips among the data", _RATE),
        "smeared": (_RATE, "clips with blended frames among the data", _LONG),
        "grainy": (_RATE, "latents prepared with " + _SCALE, "noisy clips among the data"),
        "saturated": (_RATE, "text_dropout too low for the guidance_scale in use", "saturated clips among the data"),
        "frozen": (_LONG, "clips without motion among the data", _RATE),
        "identical": (_LONG, "clips without motion among the data"),
        "black": (_RATE + ": the weights are lost", "values beyond the dtype's range"),
        "non_finite": (_RATE + ": the weights are lost", "values beyond the dtype's range"),
        "artefacts": (_RATE, "latents prepared with " + _SCALE, "compression blocks in the clips"),
        "unchanged": ("the samples are not made with the trained weights", "learning rate too low", _EMA, "frozen parameters"),
        "ema_behind": (_EMA,),
        "": (_RATE, "the clips themselves", _EMA),
    },
    5: {
        "soft": ("the export's VAE or scheduler config differs from training's", "weights lost or mixed up in conversion", "dtype"),
        "washed_out": ("scaling_factor in the export's VAE config", "the export's scheduler config"),
        "": ("config of VAE or scheduler in the export", "weights lost or mixed up in conversion", "dtype of the export"),
    },
}  # fmt: skip


def likely(kind: str, rung: int | None = None) -> tuple[str, ...]:
    """Causes of ``kind`` (a kind of :mod:`cogflow.sharpness.verdict`) that enters at ``rung`` 0..5, the likeliest first; without a rung
    none, since the rung settles most of it. Never raises: an unknown kind has the rung's general causes."""
    if rung not in _BY_RUNG:
        return ()
    causes = _BY_RUNG[rung]
    return causes.get(kind, causes[""])
