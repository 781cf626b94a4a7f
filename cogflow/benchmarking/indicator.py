"""What the per-step indicator costs: its own time, beside a training step of the tiny model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from cogflow.models import loading, tiny
from cogflow.models.rotary import rotary_tables
from cogflow.sharpness import spectrum
from cogflow.sharpness.trend import Trend
from cogflow.training import metric_table
from cogflow.training.objective import noised, velocity_loss

REAL = (1, 13, 16, 60, 90)
"""Latents of one clip of 49x480x720."""
TINY = (4, 3, 16, 8, 12)
"""Latents of the tiny model's usual batch of 9x64x96."""


@dataclass(frozen=True)
class Cost:
    """Seconds, medians: of the indicator at a shape, and of a step at it (forward, backward and AdamW) where one was run."""

    name: str
    indicator: float
    step: float | None

    @property
    def share(self) -> float | None:
        return None if self.step is None else self.indicator / self.step


def measure(device: torch.device, repeats: int = 20) -> list[Cost]:
    """The indicator on the tiny model's shape, beside a step of that model, and on the real shape. All of it counts: band sums, table, the
    numbers for the log, the trend. What was there before it (loss table, collective, host sync) is counted too."""
    costs = [
        Cost(
            "tiny",
            timed(_indicator(TINY, device), device, repeats),
            timed(_tiny_step(device), device, max(3, repeats // 4)),
        )
    ]
    return [*costs, Cost("49x480x720", timed(_indicator(REAL, device), device, repeats), None)]


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of ``work`` after two runs that do not count."""
    seconds = []
    for _ in range(repeats + 2):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return median(seconds[2:])


def _indicator(shape: tuple[int, ...], device: torch.device) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    truth, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    timesteps = torch.linspace(10, 990, shape[0]).long().to(device)
    alphas = torch.linspace(0.99, 0.01, 1000, device=device)
    losses = torch.ones(shape[0], device=device)
    kept, trend = spectrum.Spectrum(), Trend()

    def work() -> object:
        table = metric_table.by_quarter(
            losses, kept.sums(truth + 0.1 * noise, truth, alphas[timesteps]), timesteps
        ).cpu()
        clips = {quarter + 1: count for quarter, count in enumerate(table[1].tolist())}
        trend.update(1, spectrum.bands(table[metric_table.LOSS_ROWS :]), clips)
        return metric_table.bands(table, "spectrum")

    return work


def _tiny_step(device: torch.device) -> Callable[[], object]:
    source = tiny.folder()
    model = loading.load_transformer(source, torch.float32, device).train()
    alphas = loading.load_scheduler(source).alphas_cumprod.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    generator = torch.Generator().manual_seed(0)
    truth, noise = (torch.randn(TINY, generator=generator).to(device) for _ in range(2))
    tokens = (TINY[0], model.config.max_text_seq_length, model.config.text_embed_dim)
    text = torch.randn(tokens, generator=generator).to(device)
    timesteps = torch.linspace(10, 990, TINY[0]).long().to(device)
    rotary = rotary_tables(model, TINY[1], TINY[3], TINY[4], device=device)

    def work() -> object:
        x_t = noised(truth, noise, alphas, timesteps)
        v = model(
            hidden_states=x_t,
            encoder_hidden_states=text,
            timestep=timesteps,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        loss = velocity_loss(v, truth, x_t, alphas, timesteps).mean
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return work


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
