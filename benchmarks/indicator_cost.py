"""Compare the time of the per-step indicator with a training step of the tiny model: ``python -m
benchmarks.indicator_cost``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch

from benchmarks.output import new_parser, report
from cogflow.benchmarking.results import BenchmarkResult
from cogflow.models import loading, tiny
from cogflow.models.transformer_inputs import rotary_tables
from cogflow.runtime import ranks
from cogflow.sharpness import spectrum
from cogflow.sharpness.trend import Trend
from cogflow.training import metric_table
from cogflow.training.objective import noised, velocity_loss

REAL = (1, 13, 16, 60, 90)
"""Latents of one clip of 49x480x720."""
TINY = (4, 3, 16, 8, 12)
"""Latents of the tiny model's usual batch of 9x64x96."""


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command line ``words`` (default: ``sys.argv``)."""
    parser = new_parser("indicator_cost", __doc__)
    parser.add_argument("--repeats", type=int, default=20, help="number of timed runs, 3 or more; default: %(default)s")
    given = parser.parse_args(words)
    device = ranks.device()
    report(indicator_result(measure_indicator(device, max(3, given.repeats)), str(device)), given.output)


def indicator_result(costs: Sequence[IndicatorCost], device: str) -> BenchmarkResult:
    """Return ``costs`` as a table."""
    first = costs[0]
    times = f"{1000 * first.indicator:.2f} ms in a step of {1000 * (first.step or 0):.0f} ms on {device}"
    return BenchmarkResult(
        summary=f"indicator: {times}, {first.share or 0:.2%}",
        columns=["shape", "indicator s", "step s", "share"],
        rows=[
            [
                cost.name,
                cost.indicator,
                "" if cost.step is None else cost.step,
                "" if cost.share is None else cost.share,
            ]
            for cost in costs
        ],
        details={"rows": [{**asdict(cost), "share": cost.share, "device": device} for cost in costs]},
    )


@dataclass(frozen=True)
class IndicatorCost:
    """Median seconds of the indicator at a shape, and of a step (forward, backward and AdamW) at that shape if one was
    run."""

    name: str
    indicator: float
    step: float | None

    @property
    def share(self) -> float | None:
        return None if self.step is None else self.indicator / self.step


def measure_indicator(device: torch.device, repeats: int = 20) -> list[IndicatorCost]:
    """Measure the indicator at the tiny model's shape, with a step of that model, and at the real shape.

    The time includes the band sums, the table, the numbers for the log, the trend and the loss table of training.
    """
    tiny_cost = IndicatorCost(
        "tiny",
        median_seconds(_indicator(TINY, device), device, repeats),
        median_seconds(_tiny_step(device), device, max(3, repeats // 4)),
    )
    return [tiny_cost, IndicatorCost("49x480x720", median_seconds(_indicator(REAL, device), device, repeats), None)]


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median seconds of ``work`` over ``repeats`` runs, after two warm-up runs."""
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


if __name__ == "__main__":
    main()
