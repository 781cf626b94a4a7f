"""stage=pretrain: the recipe of the shipped tiny model, from nothing. Resumes where it stopped; hours on two cores."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline

from cogflow.config.schema import Config, PretrainStage
from cogflow.files.paths import run_folder
from cogflow.files.publish import publish_folder, write_json
from cogflow.models import tiny
from cogflow.models.loading import encode_prompts, load_text_encoder, load_tokenizer
from cogflow.models.onednn import by_onednn
from cogflow.pretraining import figures
from cogflow.pretraining.text import make_tokenizer, train_text_encoder
from cogflow.pretraining.transformer import TransformerSettings, encode_clips, train_transformer
from cogflow.pretraining.vae import VAESettings, clip_pool, normalise_latents, train_vae
from cogflow.runtime import ranks
from cogflow.runtime.console import echo, table
from cogflow.tracking.html_report import record_stage


def run(config: Config) -> None:
    stage = config.stage
    assert isinstance(stage, PretrainStage)
    started = time.time()
    folder = run_folder(config.run)
    state = folder / "state"
    state.mkdir(parents=True, exist_ok=True)
    output = Path(stage.output) if stage.output else folder / "model"
    log = Log(folder / "pretrain.log.jsonl")

    echo("1/4 tokenizer and text encoder")
    if not (state / "text_encoder" / "model.safetensors").is_file():
        tokenizer = make_tokenizer(state / "tokenizer")
        train_text_encoder(tokenizer, stage.text_steps, stage.seed, log).save_pretrained(state / "text_encoder")
    tokenizer, text_encoder = load_tokenizer(state), load_text_encoder(state)

    echo("2/4 autoencoder")
    torch.manual_seed(stage.seed)
    vae = by_onednn(tiny.new_vae())
    settings = VAESettings().scaled(stage.vae_steps)
    train_vae(vae, settings, stage.seed, state / "vae.pt", log)
    unseen = (
        clip_pool(stage.check_clips, figures.UNSEEN - 1, settings.frames, settings.height, settings.width).float()
        / 127.5
        - 1.0
    )
    factors = normalise_latents(vae, unseen)

    echo("3/4 transformer")
    device = ranks.device()
    transformer_settings = TransformerSettings(steps=stage.transformer_steps, clips=stage.clips)
    latents, captions = encode_clips(vae, transformer_settings.clips, stage.seed + 1, state / "latents.safetensors")
    torch.manual_seed(stage.seed + 2)
    transformer = tiny.new_transformer().to(device)

    def embed(texts: list[str], tokens: int) -> torch.Tensor:
        return encode_prompts(tokenizer, text_encoder, texts, tokens).to(device)

    train_transformer(
        transformer,
        latents.to(device),
        captions,
        embed,
        transformer_settings,
        stage.seed,
        state / "transformer.pt",
        log,
    )

    echo("4/4 figures")
    pipeline = CogVideoXPipeline(
        tokenizer, text_encoder, vae, transformer.cpu().to(torch.bfloat16).float(), tiny.new_scheduler()
    )
    measured = {
        "roundtrip": figures.roundtrip(vae, stage.check_clips),
        "following": figures.following(sampler(pipeline, stage.check_steps), stage.check_repeats),
    }
    with publish_folder(output, replace=True) as partial:
        # As 5B is published: the transformer in bf16, the autoencoder in fp32.
        pipeline.transformer.to(torch.bfloat16)
        pipeline.save_pretrained(partial)
        for name in ("spiece.model",):
            (partial / "tokenizer" / name).write_bytes((state / "tokenizer" / name).read_bytes())
        recipe = {
            "command": "python -m cogflow experiment=tiny_pretrain",
            "seed": stage.seed,
            "latent_factors": factors,
        }
        write_json(partial / "recipe.json", {**recipe, "steps": log.summary(), "figures": measured})
    results = {
        "summary": f"{measured['roundtrip']['psnr_mean_db']:.1f} dB round trip",
        "where": str(output),
        **measured,
    }
    record_stage(folder, "pretrain", config, {}, results, started=started)
    table(
        [[part, name, f"{value:.3f}"] for part, values in measured.items() for name, value in values.items()],
        ["part", "figure", "value"],
    )
    echo(f"model: {output}")


def sampler(pipeline: CogVideoXPipeline, steps: int) -> Any:
    """A function (prompt, seed) -> uint8 frames that uses the model's own text length."""
    pipeline.set_progress_bar_config(disable=True)

    def make(prompt: str, seed: int) -> Any:
        video = pipeline(
            prompt, num_inference_steps=steps, use_dynamic_cfg=True, guidance_scale=6.0, output_type="np", num_frames=tiny.FACTS.frames,
            max_sequence_length=tiny.FACTS.text_tokens, generator=torch.Generator().manual_seed(seed),
        ).frames[0]  # fmt: skip
        return (video * 255).round().astype("uint8")

    return make


class Log:
    """Lines of one JSON object each, and on the console now and then."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, values: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**values, "time": time.time()}) + "\n")
        if values["step"] % 100 == 0:
            echo(
                " ".join(
                    f"{name}={value:.4g}" if isinstance(value, float) else f"{value}" for name, value in values.items()
                )
            )

    def summary(self) -> dict[str, Any]:
        """Last step of each part, with the seconds it took (time between lines; pauses of over five minutes do not count)."""
        parts: dict[str, dict[str, Any]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            part = parts.setdefault(values["part"], {"seconds": 0.0, "last": values["time"]})
            part["seconds"] += min(max(0.0, values["time"] - part["last"]), 300.0)
            part |= {"last": values["time"], "step": values["step"] + 1, "loss": values["loss"]}
        return {name: {key: part[key] for key in ("step", "loss", "seconds")} for name, part in parts.items()}
