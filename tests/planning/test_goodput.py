"""Compare the goodput formulas with simulated random runs, and check the lines that a plan prints."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from cogflow.config.compose import compose
from cogflow.errors import ConfigError
from cogflow.planning import goodput, plan_report
from cogflow.planning.goodput import Goodput
from cogflow.planning.plan import Plan, plan
from cogflow.planning.step_time import pace

RUN = Goodput(
    steps=20_000, step=3.0, save=60.0, every=200, validation=100.0, sampled=1000, mtbf=50_000.0, restart=600.0
)


def made(*words: str) -> Plan:
    return plan(
        compose(
            [
                "stage=train",
                "stage.plan=true",
                "model=cogvideox-5b",
                "stage.plan_gpus=64",
                "stage.steps=100000",
                "stage.ema_decay=0",
                *words,
            ]
        )
    )


def played(run: Goodput, seed: int) -> tuple[float, int]:
    """Seconds of one run with interruptions drawn at random, save by save, and how many there were."""
    draw, clock, interruptions = random.Random(seed), 0.0, 0
    stretch = run.every * (run.step + run.validating) + run.save
    for _ in range(run.steps // run.every):
        while (until := draw.expovariate(1 / run.mtbf)) < stretch:
            clock, interruptions = clock + until + run.restart, interruptions + 1
        clock += stretch
    return clock, interruptions


def test_a_run_played_out_takes_as_long() -> None:
    runs = [played(RUN, seed) for seed in range(200)]
    assert sum(seconds for seconds, _ in runs) / len(runs) == pytest.approx(RUN.seconds, rel=0.01)
    assert sum(count for _, count in runs) / len(runs) == pytest.approx(RUN.interruptions, rel=0.1)


def test_the_shares_are_the_whole_run() -> None:
    assert RUN.share + RUN.saving_share + RUN.validation_share + RUN.lost_share == pytest.approx(1)
    assert RUN.share == pytest.approx(RUN.steps * RUN.step / RUN.seconds)
    assert RUN.lost_share == pytest.approx(RUN.interruptions * RUN.lost / RUN.seconds)


def test_no_other_interval_costs_less() -> None:
    assert RUN.best_seconds == math.sqrt(2 * 60 * 50_000)
    best = replace(RUN, every=RUN.best_every).share
    assert all(replace(RUN, every=round(factor * RUN.best_every)).share < best for factor in (0.5, 0.7, 1.4, 2))
    assert replace(RUN, save=0.01).best_every < RUN.best_every < replace(RUN, mtbf=1e6).best_every


def test_a_run_that_does_not_get_on_has_no_end() -> None:
    lost = replace(RUN, every=0)  # saved at the end only: 17 hours between interruptions that come every 14
    assert lost.between == RUN.steps and replace(lost, mtbf=20_000).seconds == math.inf
    assert replace(lost, mtbf=20_000).share == 0
    assert replace(RUN, sampled=0).validation_share == 0


def test_the_time_of_a_save_depends_on_machines_and_disk() -> None:
    """States are written by all machines, weights and averages by one; all are read twice by all."""
    one, eight = made("stage.plan_gpus=8"), made()
    states = 12 * one.shape.parameters
    for found, machines in ((one, 1), (eight, 8)):
        whole = found.disk.checkpoint
        assert found.goodput.save == pytest.approx((states / machines + whole - states + 2 * whole / machines) / 2e9)
    assert made("stage.plan_disk_gb=4").goodput.save == pytest.approx(eight.goodput.save / 2)
    alone = made("deepspeed=zero0", "model.dtype=fp32", "stage.plan_gpus=8")  # everything by rank 0
    assert alone.goodput.save == pytest.approx(3 * alone.disk.checkpoint / 2e9)


def test_interruptions_come_with_the_gpus() -> None:
    assert made().goodput.a_week == pytest.approx(64 * 24 * 7 / 50_000)
    assert made("stage.plan_gpus=512", "stage.plan_mtbf_hours=25000").goodput.a_week == pytest.approx(
        16 * made().goodput.a_week
    )
    # As Meta counted them: 419 in 54 days of 16,384 GPUs.
    assert made().stage.plan_mtbf_hours == pytest.approx(54 * 24 * 16_384 / 419, rel=0.02)
    assert made("stage.plan_restart_minutes=0").goodput.lost == pytest.approx(made().goodput.lost - 600)


def test_a_plan_prints_saves_failures_and_goodput() -> None:
    text = "\n".join(plan_report.lines(made("stage.save_every=500", "stage.sample_every=500")))
    for part in (
        "one save: 26.5 s at 2 GB/s",
        "saved every 500 steps",
        "(Young, Daly)",
        "0.22 per week",
        "goodput: 9",
        "validations 5",
        "a forecast until",
    ):
        assert part in text, text
    assert "a forecast until" not in "\n".join(plan_report.lines(made("stage.plan_tflops=400")))
    assert "saved at the end only" in "\n".join(plan_report.lines(made("stage.save_every=0")))


@pytest.mark.parametrize("wrong", ["stage.plan_disk_gb=0", "stage.plan_mtbf_hours=0", "stage.plan_restart_minutes=-1"])
def test_settings_that_mean_nothing(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.split("=")[0]):
        made(wrong)


def test_the_pace_is_operations_at_a_speed_and_what_is_not_hidden() -> None:
    one = made("stage.plan_tflops=400", "stage.gradient_accumulation=4")
    assert one.pace.compute == pytest.approx(one.flops / 400e12) and one.pace.compute == one.seconds
    faster = pace(one.shape, one.tokens, one.layout, 800)
    assert faster.compute == pytest.approx(one.pace.compute / 2) and faster.waiting >= one.pace.waiting > 0
    assert made("stage.plan_gpus=1").pace.waiting == 0


def test_an_empty_checkpoint_takes_no_time() -> None:
    one = made()
    assert goodput.save_seconds(one.shape, replace(one.layout, zero_stage=0), 0.0, 1e9) == 0
