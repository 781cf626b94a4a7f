"""Test that settings of ``speed`` change only the rounding of a step's results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from cogflow.config.compose import compose
from cogflow.config.deepspeed_section import DeepSpeedConfig
from cogflow.config.train_settings import TrainStage
from cogflow.errors import ConfigError
from cogflow.models import tiny
from cogflow.models.transformer_inputs import rotary_tables
from cogflow.planning.plan import plan
from cogflow.training import recomputation, speed
from cogflow.training.activation_memory import kept_activations
from cogflow.training.recomputation import ATTENTION, recompute

CPU = torch.device("cpu")
LATENTS = (3, 4, 6)


@pytest.fixture(autouse=True)
def usual_attention() -> Iterator[None]:
    yield
    speed.choose_attention("auto", CPU, torch.float32)


def computed(transformer: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return prediction and gradients for one random clip."""
    generator = torch.Generator().manual_seed(1)
    config: Any = transformer.config
    transformer.zero_grad()
    x_t = torch.randn(1, LATENTS[0], 16, *LATENTS[1:], generator=generator)
    embeds = torch.randn(1, config.max_text_seq_length, config.text_embed_dim, generator=generator)
    tables = rotary_tables(transformer, *LATENTS, device=CPU)
    v = transformer(x_t, embeds, torch.tensor([500]), image_rotary_emb=tables, return_dict=False)[0]
    v.square().mean().backward()
    return v.detach(), {name: parameter.grad.clone() for name, parameter in transformer.named_parameters()}  # type: ignore[union-attr]


def same(one: tuple[torch.Tensor, dict[str, torch.Tensor]], two: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
    assert torch.allclose(one[0], two[0], rtol=1e-4, atol=1e-5)
    assert one[1].keys() == two[1].keys()
    for name, gradient in one[1].items():
        assert (gradient - two[1][name]).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("kernel", ["flash", "math"])
def test_every_attention_kernel_computes_the_same(kernel: str) -> None:
    transformer = tiny.new_transformer()
    expected = computed(transformer)
    speed.choose_attention(kernel, CPU, torch.float32)
    same(expected, computed(transformer))


@pytest.mark.parametrize(
    ("kernel", "device", "dtype"),
    [("cudnn", "cpu", "bfloat16"), ("efficient", "cpu", "float32"), ("flash", "cuda", "float32")],
)
def test_an_unavailable_kernel_is_refused(kernel: str, device: str, dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"speed.attention={kernel}"):
        speed.choose_attention(kernel, torch.device(device), getattr(torch, dtype))


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_with_few_programs() -> None:
    transformer = tiny.new_transformer()
    expected, names = computed(transformer), list(transformer.state_dict())
    counters.clear()
    speed.compile_blocks(transformer, "blocks")
    same(expected, computed(transformer))
    assert list(transformer.state_dict()) == names
    # The inputs of the first block have other strides, so it has a program of its own.
    assert counters["stats"]["unique_graphs"] <= 2 < len(transformer.transformer_blocks), counters["stats"]
    # Blocks that recompute everything run the same program. Blocks that keep something have another.
    for keep in ("nothing", "attention", "products", "all"):
        recompute(transformer.train(), DeepSpeedConfig(activation_checkpointing=True, checkpoint_keep=keep))
        same(expected, computed(transformer))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 2 + 3 * 2


@pytest.mark.parametrize(("how", "mode"), [("blocks", None), ("graphs", "reduce-overhead")])
@pytest.mark.parametrize("keep", ["nothing", "products"])
def test_recomputed_blocks_are_compiled_for_cuda_graphs(
    how: str, mode: str | None, keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def compiled(function: Callable[..., Any], mode: str | None = None, **_: object) -> Callable[..., Any]:
        asked.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    recomputation._compiled.cache_clear()
    transformer = tiny.new_transformer()
    expected = computed(transformer)
    speed.compile_blocks(transformer, how)
    recompute(
        transformer.train(),
        DeepSpeedConfig(activation_checkpointing=True, checkpoint_keep=keep),
        mode=speed.compile_mode(how),
    )
    same(expected, computed(transformer))
    recomputation._compiled.cache_clear()
    assert set(asked) == {mode}


@pytest.mark.parametrize(("count", "dropped"), [(0, []), (2, [0, 2]), (5, [0, 1, 2, 3, 4])])
def test_recomputed_blocks_are_spread_evenly(count: int, dropped: list[int]) -> None:
    transformer = tiny.new_transformer()
    expected = computed(transformer)
    recompute(
        transformer.train(), DeepSpeedConfig(activation_checkpointing=True), {"nothing": count, "everything": 5 - count}
    )
    ran = [0] * len(transformer.transformer_blocks)
    for place, block in enumerate(transformer.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, place=place: ran.__setitem__(place, ran[place] + 1))
    same(expected, computed(transformer))
    assert [place for place, times in enumerate(ran) if times == 2] == dropped and set(ran) <= {1, 2}


def test_a_plan_recomputes_as_few_blocks_as_memory_allows() -> None:
    def words(memory: float, *more: str) -> list[str]:
        given = [
            "stage=train",
            "model=cogvideox-5b",
            "stage.ema_decay=0",
            "data=folder",
            "stage.plan=true",
            "stage.plan_gpus=8",
            "stage.sample_every=0",
        ]
        given += ["deepspeed.checkpoint_every_block=0", "deepspeed.checkpoint_keep=nothing"]
        return [*given, f"stage.plan_memory_gb={memory}", *more]

    plans = [plan(compose(words(memory))) for memory in (30, 80, 100, 110, 192)]
    counts = [one.layout.recomputed(42) for one in plans]
    assert counts[0] == plans[0].shape.layers == 42 and counts[-1] == 0
    assert sorted(counts, reverse=True) == counts and 0 < counts[2] < 42
    for one, memory in zip(plans[1:], (80, 100, 110, 192), strict=True):
        assert one.gpu.peak <= 0.95e9 * memory
    assert kept_activations(compose(words(80))) == {"nothing": counts[1], "everything": 42 - counts[1]}
    assert kept_activations(compose([*words(80, "deepspeed.activation_checkpointing=false")])) is None
    assert isinstance(plans[0].stage, TrainStage)


def test_a_plan_keeps_as_much_of_recomputed_blocks_as_memory_allows() -> None:
    def kept_of(memory: float, *more: str) -> dict[str, int]:
        given = [
            "stage=train",
            "model=cogvideox-5b",
            "stage.ema_decay=0",
            "data=folder",
            "stage.plan=true",
            "stage.plan_gpus=8",
            "stage.sample_every=0",
        ]
        made = plan(compose([*given, f"stage.plan_memory_gb={memory}", *more]))
        assert made.gpu.peak <= 0.95e9 * memory or memory == 30
        return {keep: count for keep, count in made.layout.kept(42).items() if count}

    every = [kept_of(memory, "deepspeed.checkpoint_every_block=0") for memory in (30, 40, 60, 80, 100, 192)]
    assert every[0] == {"nothing": 42} and every[-1] == {"everything": 42}
    assert [set(one) for one in every[1:-1]] == [
        {"nothing", "attention"},
        {"attention", "products"},
        {"products", "all"},
        {"all", "everything"},
    ]
    # All blocks are recomputed where the settings say so.
    assert [kept_of(memory) for memory in (30, 60, 75, 192)] == [
        {"nothing": 42},
        {"attention": 42},
        {"products": 42},
        {"all": 42},
    ]
    assert kept_of(192, "deepspeed.checkpoint_every_block=2", "deepspeed.checkpoint_keep=attention") == {
        "attention": 21,
        "everything": 21,
    }


@pytest.mark.parametrize("keep", ["attention", "products", "all"])
def test_kept_activations_are_not_recomputed_and_gradients_are_equal(keep: str) -> None:
    transformer = tiny.new_transformer()
    expected = computed(transformer)
    with Counted() as plain:
        computed(transformer)
    recompute(transformer.train(), DeepSpeedConfig(activation_checkpointing=True, checkpoint_keep=keep))
    with Counted() as again:
        found = computed(transformer)
    assert torch.equal(found[0], expected[0]) and all(
        torch.equal(found[1][name], one) for name, one in expected[1].items()
    )
    blocks = len(transformer.transformer_blocks)
    more = {name: again.calls[name] - plain.calls[name] for name in ("attention", "widest", "others")}
    # Four linear layers of attention and the feed-forward's second; the widest are its first and the two modulations.
    assert more == {
        "attention": 0,
        "widest": 0 if keep == "all" else 3 * blocks,
        "others": 5 * blocks if keep == "attention" else 0,
    }


class Counted(TorchDispatchMode):
    """Counts attention and matrix products of linear layers, the widening ones separately."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in ATTENTION:
            self.calls["attention"] += 1
        if function is torch.ops.aten.addmm.default:
            self.calls["widest" if args[2].shape[1] > args[2].shape[0] else "others"] += 1
        return function(*args, **(kwargs or {}))
