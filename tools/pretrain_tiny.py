"""Train the tiny model that cogflow ships from random weights: ``python -m tools.pretrain_tiny [--folder FOLDER]``.

The command resumes where it stopped. It takes hours on two CPU cores. ``--quick`` runs every part in a few steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from transformers import T5EncoderModel

from cogflow.files.atomic_write import write_json
from cogflow.files.publish import publish_folder
from cogflow.models import tiny
from cogflow.models.loading import encode_prompts, load_text_encoder, load_tokenizer, use_onednn_convolutions
from cogflow.runtime import ranks
from cogflow.runtime.console import echo, table
from cogflow.runtime.run_lock import hold_run
from cogflow.tracking.stage_record import shown_command
from tools import tiny_quality
from tools.tiny_text import make_tokenizer, train_text_encoder
from tools.tiny_transformer import TransformerSettings, encode_clips, train_transformer
from tools.tiny_vae import VAESettings, clip_pool, normalise_latents, train_vae


@dataclass(frozen=True)
class RecipeSettings:
    """Each field is an option of the command: ``text_steps`` is ``--text-steps``."""

    seed: int = 0  # seed of all random values in the recipe
    text_steps: int = 500  # steps of the text encoder
    vae_steps: int = 3700  # steps of the autoencoder
    transformer_steps: int = 16000  # steps of the transformer
    clips: int = 2048  # clips drawn for the transformer
    check_clips: int = 64  # unseen clips that scale the latents and go through the autoencoder at the end
    check_steps: int = 20  # denoising steps of each sample that is checked at the end
    check_repeats: int = 2  # 24 times this number of samples are checked at the end


QUICK = RecipeSettings(
    text_steps=4, vae_steps=8, transformer_steps=4, clips=16, check_clips=4, check_steps=2, check_repeats=1
)
"""Return a recipe of a few steps, which tests every part. Its model is useless."""


def main(words: Sequence[str] | None = None) -> None:
    """Run the recipe with the command line ``words`` (default: ``sys.argv``)."""
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain_tiny", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/tiny-pretrain"), help="state, log and model/ (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="run only a few steps of every part, as a test")
    for option in fields(RecipeSettings):
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=int, help=f"default {option.default}")
    given = parser.parse_args(words)
    values = {option.name: getattr(given, option.name) for option in fields(RecipeSettings)}
    base = QUICK if given.quick else RecipeSettings()
    settings = replace(base, **{name: value for name, value in values.items() if value is not None})
    with hold_run(given.folder, shown_command()):
        pretrain(settings, given.folder)


def pretrain(settings: RecipeSettings, folder: Path) -> None:
    """Train every part, or continue from ``folder``/state, and publish the pipeline as ``folder``/model with
    ``recipe.json``."""
    state = folder / "state"
    state.mkdir(parents=True, exist_ok=True)
    log = StepLog(folder / "pretrain.log.jsonl")

    echo("1/4 tokenizer and text encoder")
    if not (state / "text_encoder" / "model.safetensors").is_file():
        new_tokenizer = make_tokenizer(state / "tokenizer")
        encoder = train_text_encoder(new_tokenizer, settings.text_steps, settings.seed, log)
        encoder.save_pretrained(state / "text_encoder")
    tokenizer, text_encoder = load_tokenizer(state), load_text_encoder(state)

    echo("2/4 autoencoder")
    torch.manual_seed(settings.seed)
    vae = use_onednn_convolutions(tiny.new_vae())
    vae_settings = VAESettings().scaled(settings.vae_steps)
    train_vae(vae, vae_settings, settings.seed, state / "vae.pt", log)
    size = (vae_settings.frames, vae_settings.height, vae_settings.width)
    unseen = clip_pool(settings.check_clips, tiny_quality.UNSEEN - 1, *size).float() / 127.5 - 1.0
    factors = normalise_latents(vae, unseen)

    echo("3/4 transformer")
    transformer = _train_transformer(settings, vae, tokenizer, text_encoder, state, log)

    echo("4/4 metrics")
    weights = transformer.cpu().to(torch.bfloat16).float()
    pipeline = CogVideoXPipeline(tokenizer, text_encoder, vae, weights, tiny.new_scheduler())
    sample = make_sampler(pipeline, settings.check_steps)
    metrics = {
        "roundtrip": tiny_quality.measure_roundtrip(vae, settings.check_clips),
        "prompt_following": tiny_quality.measure_prompt_following(sample, settings.check_repeats),
    }
    with publish_folder(folder / "model", replace=True) as partial:
        # The dtypes of the published 5B model: the transformer in bf16, the autoencoder in fp32.
        pipeline.transformer.to(torch.bfloat16)
        pipeline.save_pretrained(partial)
        (partial / "tokenizer" / "spiece.model").write_bytes((state / "tokenizer" / "spiece.model").read_bytes())
        recipe = {"command": "python -m tools.pretrain_tiny", "seed": settings.seed, "latent_factors": factors}
        write_json(partial / "recipe.json", {**recipe, "steps": log.summary(), "metrics": metrics})
    table(
        [[part, name, f"{value:.3f}"] for part, values in metrics.items() for name, value in values.items()],
        ["part", "metric", "value"],
    )
    echo(f"model: {folder / 'model'}")


def _train_transformer(
    settings: RecipeSettings,
    vae: AutoencoderKLCogVideoX,
    tokenizer: Any,
    text_encoder: T5EncoderModel,
    state: Path,
    log: StepLog,
) -> Any:
    """Return the trained ``CogVideoXTransformer3DModel``, on the device of this process."""
    device = ranks.device()
    transformer_settings = TransformerSettings(
        seed=settings.seed, steps=settings.transformer_steps, clips=settings.clips
    )
    latents, captions = encode_clips(vae, settings.clips, settings.seed + 1, state / "latents.safetensors")
    torch.manual_seed(settings.seed + 2)
    transformer = tiny.new_transformer().to(device)

    def embed(texts: list[str], tokens: int) -> torch.Tensor:
        return encode_prompts(tokenizer, text_encoder, texts, tokens).to(device)

    train_transformer(
        transformer,
        latents.to(device),
        captions,
        embed=embed,
        settings=transformer_settings,
        state_file=state / "transformer.pt",
        log=log,
    )
    return transformer


def make_sampler(pipeline: CogVideoXPipeline, steps: int) -> tiny_quality.SampleFunction:
    """Return a function (prompt, seed) -> uint8 ``[frames, height, width, 3]`` with the model's own text length."""
    pipeline.set_progress_bar_config(disable=True)

    def sample(prompt: str, seed: int) -> np.ndarray:
        video = pipeline(
            prompt,
            num_inference_steps=steps,
            use_dynamic_cfg=True,
            guidance_scale=6.0,
            output_type="np",
            num_frames=tiny.SPEC.frames,
            max_sequence_length=tiny.SPEC.text_tokens,
            generator=torch.Generator().manual_seed(seed),
        ).frames[0]
        return np.asarray((video * 255).round().astype("uint8"))

    return sample


class StepLog:
    """Append one JSON object per call to a file, and print every hundredth step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, values: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**values, "time": time.time()}) + "\n")
        if values["step"] % 100 == 0:
            cells = [
                f"{name}={value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()
            ]
            echo(" ".join(cells))

    def summary(self) -> dict[str, Any]:
        """Return the last step, its loss and the seconds of each part. A pause counts as at most five minutes."""
        parts: dict[str, dict[str, Any]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            part = parts.setdefault(values["part"], {"seconds": 0.0, "last": values["time"]})
            part["seconds"] += min(max(0.0, values["time"] - part["last"]), 300.0)
            part |= {"last": values["time"], "step": values["step"] + 1, "loss": values["loss"]}
        return {name: {key: part[key] for key in ("step", "loss", "seconds")} for name, part in parts.items()}


if __name__ == "__main__":
    main()
