"""Whole plans: every model with every way of sharing the states, what is printed, and what is advised where it does
not fit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cogflow.config.compose import compose, groups
from cogflow.config.config import Config
from cogflow.errors import ConfigError
from cogflow.models.family import MODEL_SPECS
from cogflow.planning import advice, plan_report, run_size
from cogflow.planning.plan import Plan, plan

MODELS = sorted(set(MODEL_SPECS) - {"tiny"})


def config(*words: str) -> Config:
    """The recipe of the large models keeps an EMA; these tests count the memory without one unless they ask for it."""
    return compose(["stage=train", "stage.plan=true", "stage.ema_decay=0", *words])


def made(*words: str) -> Plan:
    return plan(config(*words))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("deepspeed", sorted(advice.PRESETS))
def test_every_model_with_every_way_of_sharing(model: str, deepspeed: str) -> None:
    """Composed and checked without model.path and data.path, and planned on the meta device."""
    one = made(
        f"model={model}", "data=folder", f"deepspeed={deepspeed}", "stage.plan_gpus=8", "stage.plan_memory_gb=80"
    )
    assert one.dtype == MODEL_SPECS[model].dtype and one.layout.gpus == 8 and one.layout.local == 8
    assert min(one.gpu.parts.values()) >= 0 and one.gpu.peak > 1e9 and one.host.peak > 1e9 and one.seconds > 0.1
    text = "\n".join(plan_report.lines(one))
    assert f"{one.shape.parameters:,} parameters" in text and f"{one.tokens.total:,} tokens" in text and "ZeRO" in text
    # The decoder of 1.5's size is what fills such a GPU; with tiles everything fits, in every way of sharing.
    assert bool(one.misfits()) == model.startswith("cogvideox1.5")
    assert not made(
        f"model={model}", f"deepspeed={deepspeed}", "stage.plan_gpus=8", "sampling.vae_tiling=true"
    ).misfits()


def test_the_presets_are_the_yaml_files() -> None:
    assert set(advice.PRESETS) <= set(groups()["deepspeed"])
    for name, values in advice.PRESETS.items():
        found = config(f"deepspeed={name}").deepspeed
        assert {key: getattr(found, key) for key in values} == values


def test_one_gpu_of_141_gb_takes_5b_and_one_of_80_gb_does_not() -> None:
    words = ["model=cogvideox-5b", "stage.plan_gpus=1"]
    assert not made(*words, "stage.plan_memory_gb=141").misfits()
    small = made(*words, "stage.plan_memory_gb=80", "stage.plan_host_gb=256")
    assert "optimizer step" in small.misfits()[0]
    best = advice.options(small)[0]
    assert best.words == ("deepspeed=zero2_offload",) and best.gpus == 1
    assert not made(*words, *best.words, "stage.plan_memory_gb=80", "stage.plan_host_gb=256").misfits()


def test_each_advised_option_fits() -> None:
    """Each option's words, given as they stand, make a plan that fits."""
    words = ["model=cogvideox1.5-5b", "stage.plan_memory_gb=80", "stage.plan_host_gb=1000"]
    found = advice.options(made(*words, "stage.plan_gpus=1"))
    assert len(found) > 3
    for option in found:
        overrides = [word for word in option.words if "=" in word and " " not in word]
        again = made(*words, *overrides, f"stage.plan_gpus={option.gpus}")
        assert not again.misfits() and again.gpu.peak == option.gpu.peak and again.host.peak == option.host.peak


def test_when_nothing_fits_other_changes_are_advised() -> None:
    words = ["model=cogvideox-5b", "stage.batch_size=4", "stage.plan_memory_gb=12", "stage.plan_gpus=1"]
    with pytest.raises(ConfigError) as caught:
        plan_report.show(config(*words))
    for part in ("No way to shard", "stage.batch_size=1 stage.gradient_accumulation=4", "data.frames"):
        assert part in str(caught.value)


def test_host_memory_is_judged_where_it_is_known() -> None:
    words = [
        "model=cogvideox-5b",
        "deepspeed=zero2_offload",
        "stage.plan_memory_gb=80",
        "stage.ema_decay=0.999",
        "stage.plan_gpus=1",
    ]
    assert not made(*words).misfits()
    small = made(*words, "stage.plan_host_gb=64")
    assert "host memory" in small.misfits()[0] and "stage.ema_decay=0" in plan_report.hint(small)


def test_more_gpus_hold_less_each_and_send_more() -> None:
    for deepspeed in ("zero2", "zero3"):
        words = ["model=cogvideox-5b", f"deepspeed={deepspeed}", "deepspeed.checkpoint_keep=nothing"]
        sizes = [made(*words, f"stage.plan_gpus={gpus}") for gpus in (1, 8, 64)]
        assert sizes[0].gpu.peak > sizes[1].gpu.peak > sizes[2].gpu.peak
        assert sizes[0].traffic.between_gpus == 0 < sizes[1].traffic.between_gpus < sizes[2].traffic.between_gpus
    two, three = (
        made("model=cogvideox-5b", f"deepspeed={name}", "stage.plan_gpus=8").traffic for name in ("zero2", "zero3")
    )
    # Weights in bf16; gradients travel in fp32, in bf16 where that is asked for. ZeRO-2 all-reduces them; ZeRO-3
    # holds 2e9 weights.
    assert two.between_gpus == pytest.approx((1 + 2 * 2) * 11.14e9 * 7 / 8, rel=0.01)
    assert three.between_gpus == pytest.approx((2 + 2 - 2e9 / 5.57e9) * 11.14e9 * 7 / 8, rel=0.01)
    half = made("model=cogvideox-5b", "deepspeed=zero2", "deepspeed.reduce_dtype=model", "stage.plan_gpus=8").traffic
    assert half.between_gpus == pytest.approx((1 + 2) * 11.14e9 * 7 / 8, rel=0.01)


def test_a_shared_sequence_divides_activations_and_work_and_sends_tokens() -> None:
    words = [
        "model=cogvideox1.5-5b",
        "sampling.vae_tiling=true",
        "stage.plan_gpus=8",
        "deepspeed.checkpoint_keep=nothing",
    ]
    alone, shared = made(*words), made(*words, "parallel.sequence=4")
    for part in ("activations", "temporary peak"):
        assert shared.gpu.parts[part] == pytest.approx(alone.gpu.parts[part] / 4)
    assert shared.gpu.parts["sampling"] == alone.gpu.parts["sampling"]  # each GPU samples by itself
    assert shared.flops == pytest.approx(alone.flops / 4) and (alone.clips_per_step, shared.clips_per_step) == (8, 2)
    # Queries, keys, values and results, of a quarter of the tokens each, three quarters of which leave; forward,
    # backward and once more.
    one = shared.tokens.total / 4 * 3072 * 2 * 3 / 4
    assert shared.traffic.tokens == pytest.approx(42 * 3 * 4 * one) and alone.traffic.tokens == 0
    assert made(
        *words, "parallel.sequence=4", "deepspeed.activation_checkpointing=false"
    ).traffic.tokens == pytest.approx(42 * 2 * 4 * one)
    text = "\n".join(plan_report.lines(shared))
    assert "per 4 GPUs, which share its tokens" in text and ", tokens " in text


def test_a_clip_too_long_for_one_gpu_is_shared_where_nothing_else_helps() -> None:
    words = [
        "model=cogvideox1.5-5b",
        "data.frames=161",
        "sampling.vae_tiling=true",
        "stage.plan_memory_gb=40",
        "stage.plan_gpus=8",
    ]
    option = advice.options(made(*words))[0]
    assert "parallel.sequence=2" in option.words and "stage.gradient_accumulation=2" in option.words
    again = made(*words, *option.words)
    assert not again.misfits() and again.gpu.peak == option.gpu.peak and again.clips_per_step == 8
    for size, what in ((3, "the 8 ranks"), (5, "the 48 attention heads")):
        with pytest.raises(ConfigError, match=what):
            made(*words[:-1], f"stage.plan_gpus={8 if size == 3 else 10}", f"parallel.sequence={size}")


def test_epochs_are_counted_in_the_folder(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    rows = [json.dumps({"file_name": f"{index}.mp4", "text": f"clip {index}"}) for index in range(24)]
    (clips / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    words = ["model=cogvideox-5b", "data=folder", f"data.path={clips}", "stage.plan_gpus=2", f"run.root={tmp_path}"]
    one = made(*words)
    assert (one.clips.training, one.clips.holdout) == (22, 2)
    assert "an epoch is 11 steps" in "\n".join(plan_report.lines(one))
    assert run_size.clips(config("data=folder", "data.path=/nowhere"), tmp_path).training is None
    assert not (tmp_path / "cogvideox-5b").exists()


def test_a_validation_is_counted() -> None:
    one = made("experiment=cogvideox_5b_sft", "sampling.seeds=[0,1]", "stage.plan_gpus=8")
    assert one.samples == 8 and one.validation_flops == pytest.approx(8 * 50 * 2 * one.forward.total)
    assert one.validation_seconds == pytest.approx(50 * 2 * one.forward.total / (one.device.tflops * 1e12))
    assert made("model=cogvideox-5b", "stage.sample_every=0").sampling is None


def test_an_expensive_validation_names_cheaper_settings() -> None:
    words = ["model=cogvideox-5b", "stage.plan_gpus=8", "sampling.seeds=[0,1]", "stage.steps=1000"]
    text = "\n".join(plan_report.lines(made(*words, "stage.sample_every=100")))
    found = re.search(
        r"expensive: stage.sample_every=(\d+), sampling.steps=(\d+) or fewer prompts would reduce it to 10%", text
    )
    assert found is not None, text
    cheaper = made(*words, f"stage.sample_every={found[1]}")
    assert cheaper.validation_seconds <= 0.1 * int(found[1]) * cheaper.pace.step
    fewer = made(*words, "stage.sample_every=100", f"sampling.steps={found[2]}")
    assert fewer.validation_seconds <= 0.1 * 100 * fewer.pace.step
    for affordable in (cheaper, fewer):
        assert "expensive" not in "\n".join(plan_report.lines(affordable))


def test_the_command_prints_a_plan_without_deepspeed(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom cogflow.cli import main\n"
        "done = main(['stage=train', 'stage.plan=true', 'model=cogvideox-5b', 'model.path=/nowhere', "
        "'data=folder', 'data.path=/none',"
        " 'stage.ema_decay=0', 'stage.plan_memory_gb=141', 'stage.plan_tflops=500'])\n"
        "assert 'deepspeed' not in sys.modules\nsys.exit(done)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for part in ("5,570,283,072 parameters", "17,776 tokens", "at 500 TFLOP/s", "it fits"):
        assert part in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_flow_does_not_plan() -> None:
    with pytest.raises(ConfigError, match="stage=train stage.plan=true"):
        compose(["stage=flow", "stage.train.plan=true"])


def test_the_largest_bucket_decides() -> None:
    words = ["model=cogvideox-5b", "stage.plan_gpus=8"]
    one = made(*words, "data.buckets=[17x480x720,49x480x720,49x320x480]")
    assert one.tokens == made(*words).tokens and one.gpu.peak == made(*words).gpu.peak
    assert "the largest of 3 buckets" in "\n".join(plan_report.lines(one))
