"""Train the tiny transformer from random weights on the latents of drawn clips.

The loop is plain: it has the loss of ``stage=train``, and no cache, no ranks and no validations. Captions are padded to
the model's text length, and in every twentieth step to 226 tokens, the default of ``CogVideoXPipeline``, so that the
shipped folder samples well with both lengths.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn

from cogflow.data.shapes import draw, scenes
from cogflow.models.tiny import SPEC, new_scheduler
from cogflow.models.transformer_inputs import rotary_tables
from cogflow.runtime.progress import progress
from cogflow.training.objective import noised, velocity_loss

PIPELINE_TOKENS = 226


@dataclass(frozen=True)
class TransformerSettings:
    seed: int = 0
    steps: int = 16000
    batch: int = 16
    clips: int = 2048
    learning_rate: float = 1.2e-3
    warmup: int = 100
    decay: float = 0.15  # share of the steps in which the rate falls, at the end
    text_dropout: float = 0.1
    ema_decay: float = 0.995
    timestep_mean: float = 0.5
    timestep_std: float = 1.0
    long_every: int = 20
    save_every: int = 100


def draw_timesteps(rng: np.random.Generator, settings: TransformerSettings) -> np.ndarray:
    """Return int64 ``[batch]`` in 0..999, logit-normal (Esser et al. 2024, arXiv:2403.03206, section 3.1).

    ``stage=train`` draws timesteps uniformly, as SAT does. A training from random weights mainly has to learn the
    outlines of shapes, which are decided above the middle timesteps. The ends teach texture and the mean picture.
    """
    position = rng.normal(settings.timestep_mean, settings.timestep_std, settings.batch)
    return np.minimum(999, (1000.0 / (1.0 + np.exp(-position))).astype(np.int64))


def learning_rate(step: int, settings: TransformerSettings) -> float:
    """Return the rate of a step: warm-up, constant, then a decay to 1 % (Hu et al. 2024, arXiv:2404.06395, section 4).

    Outlines are learned late and only at a high rate. With a cosine schedule, shapes stopped improving at a quarter of
    the rate.
    """
    left = (settings.steps - step) / max(1.0, settings.decay * settings.steps)
    return settings.learning_rate * min(1.0, (step + 1) / settings.warmup, max(0.01, left))


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLCogVideoX, count: int, seed: int, state_file: Path
) -> tuple[torch.Tensor, list[str]]:
    """Return scaled latents ``[count, frames, channels, h, w]`` of drawn clips of the base concepts, with captions.

    The latents are kept in ``state_file``, which belongs to one autoencoder: a changed one needs another file.
    """
    drawn = scenes(count, seed)
    if not state_file.is_file():
        latents = []
        with progress(count, "clips") as bar:
            for scene in drawn:
                clip = (
                    torch.from_numpy(draw(scene, SPEC.frames, SPEC.height, SPEC.width)).permute(3, 0, 1, 2).float()
                    / 127.5
                    - 1.0
                )
                latents.append(vae.encode(clip[None]).latent_dist.mode()[0].transpose(0, 1) * SPEC.scaling_factor)
                bar.advance()
        beside = state_file.with_suffix(".tmp")
        save_file({"latents": torch.stack(latents)}, beside)
        beside.replace(state_file)
    return load_file(state_file)["latents"], [scene.caption for scene in drawn]


def train_transformer(
    transformer: CogVideoXTransformer3DModel,
    latents: torch.Tensor,
    captions: list[str],
    embed: Callable[[list[str], int], torch.Tensor],
    settings: TransformerSettings,
    state_file: Path,
    log: Callable[[dict[str, str | float]], None],
) -> None:
    """Train ``transformer`` in place and leave the averaged weights in it; resume from ``state_file``.

    ``embed(texts, tokens)`` gives embeddings ``[len(texts), tokens, width]``.
    """
    distinct = sorted({*captions, ""})
    place = {text: index for index, text in enumerate(distinct)}
    which = torch.tensor([place[text] for text in captions])
    tables = {length: embed(distinct, length) for length in (SPEC.text_tokens, PIPELINE_TOKENS)}
    alphas = new_scheduler().alphas_cumprod
    _, frames, _, height, width = latents.shape
    rotary = rotary_tables(transformer, frames, height, width, latents.device)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=1e-2
    )
    averaged = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    first = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        transformer.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, first = state["ema"], state["step"]
    else:
        nn.init.zeros_(transformer.proj_out.weight)
    transformer.train()
    started, smooth = time.monotonic(), None
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        rng = np.random.default_rng([settings.seed, step])
        chosen = torch.from_numpy(rng.integers(0, len(latents), settings.batch))
        texts = which[chosen].masked_fill(
            torch.from_numpy(rng.random(settings.batch) < settings.text_dropout), place[""]
        )
        length = PIPELINE_TOKENS if step % settings.long_every == settings.long_every - 1 else SPEC.text_tokens
        timesteps = torch.from_numpy(draw_timesteps(rng, settings))
        x0 = latents[chosen]
        noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
        x_t = noised(x0, noise, alphas, timesteps)
        v = transformer(x_t, tables[length][texts], timesteps, image_rotary_emb=rotary, return_dict=False)[0]
        loss = velocity_loss(v, x0, x_t, alphas, timesteps).mean
        loss.backward()
        norm = nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            # A slow average would consist mostly of the initial weights early on, so it follows quickly at first.
            decay = min(settings.ema_decay, (1 + step) / (10 + step))
            for name, p in transformer.named_parameters():
                averaged[name].lerp_(p, 1.0 - decay)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 20 == 0 or step + 1 == settings.steps:
            seconds = time.monotonic() - started
            log({"part": "transformer", "step": step, "loss": smooth, "grad_norm": norm.item(), "seconds": seconds})
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            beside = state_file.with_suffix(".tmp")
            torch.save(
                {
                    "model": transformer.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "ema": averaged,
                    "step": step + 1,
                },
                beside,
            )
            beside.replace(state_file)
    transformer.load_state_dict(averaged, strict=True)
    transformer.eval()
