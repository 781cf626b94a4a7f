"""The cost model for many GPUs, and the document that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogflow.planning import scale, step_time
from cogflow.training.gpu_layout import GpuLayout


def test_the_document_shows_the_table(repository: Path) -> None:
    text = (repository / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scale.markdown() in text and scale.runs_markdown() in text


def test_every_row_fits_and_larger_machines_wait_no_less() -> None:
    rows = list(scale.rows())
    assert len(rows) == len(scale.MODELS) * len(scale.GPUS) * len(scale.MEMORY)
    for one in rows:
        assert one.peak_gb <= one.memory_gb and one.host_gb <= scale.HOST and 0 <= one.waiting < 0.5
        assert one.clips_per_second == pytest.approx(one.gpus / one.seconds)
        assert 0.8 < one.run.share <= one.cheapest.share < 1
    by = {(one.model, one.gpus, one.memory_gb): one for one in rows}
    for model in scale.MODELS:
        for memory in scale.MEMORY:
            small, large = by[model, 8, memory], by[model, 512, memory]
            assert large.waiting > small.waiting
            assert (
                large.run.a_week == pytest.approx(64 * small.run.a_week) and large.run.best_every < small.run.best_every
            )
        assert by[model, 8, 141].seconds <= by[model, 8, 80].seconds


def setting(stage: int, *, overlap: bool) -> GpuLayout:
    return GpuLayout(
        zero_stage=stage,
        offload_optimizer=False,
        offload_parameters=False,
        checkpointing=True,
        checkpoint_every=1,
        gpus=16,
        local=8,
        bytes=2,
        reduced_bytes=2,
        batch=1,
        accumulation=1,
        reduce_bucket=10**8,
        gather_bucket=10**8,
        overlap=overlap,
        ema=False,
        ema_every=1,
        ema_on_host=False,
    )


def test_traffic_that_overlaps_computation_costs_no_time() -> None:
    sent = step_time.Traffic(gradients=40e9, weights=40e9, averages=0, host=0, seconds=2)
    assert step_time.exposed(sent, setting(2, overlap=False), backward=5, compute=8) == pytest.approx(2)
    assert step_time.exposed(sent, setting(2, overlap=True), backward=5, compute=8) == pytest.approx(1)
    assert step_time.exposed(sent, setting(2, overlap=True), backward=0.25, compute=8) == pytest.approx(1.75)
    assert step_time.exposed(sent, setting(3, overlap=True), backward=5, compute=8) == 0
    assert step_time.exposed(sent, setting(3, overlap=True), backward=0.5, compute=1) == pytest.approx(1)
