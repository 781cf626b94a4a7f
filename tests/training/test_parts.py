"""Test frozen weights by pattern, and activation recomputation of all blocks or of some."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cogflow.config.deepspeed_section import DeepSpeedConfig
from cogflow.errors import ConfigError
from cogflow.models import tiny
from cogflow.training import initial_weights
from cogflow.training.recomputation import recompute


@pytest.fixture
def transformer() -> Any:
    torch.manual_seed(0)
    return tiny.new_transformer().train()


def test_weights_that_match_a_pattern_are_frozen(transformer: Any) -> None:
    initial_weights.freeze(transformer, ["patch_embed.*", "transformer_blocks.0.*"])
    for name, parameter in transformer.named_parameters():
        assert parameter.requires_grad != name.startswith(("patch_embed.", "transformer_blocks.0.")), name


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["patch_embedd.*"], "patch_embedd.* matches no weight"),
        (["*"], "freezes every weight"),
        (["proj_out"], "Names begin with"),
    ],
)
def test_a_useless_freeze_pattern_is_refused(transformer: Any, patterns: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        initial_weights.freeze(transformer, patterns)
    assert said in f"{caught.value} {caught.value.hint}"


def passed(transformer: Any) -> tuple[list[int], list[torch.Tensor]]:
    """Return how often each block ran in one forward and backward pass, and the gradients."""
    config, ran = transformer.config, [0] * len(transformer.transformer_blocks)
    hooks = []
    for index, block in enumerate(transformer.transformer_blocks):

        def count(*_: Any, index: int = index) -> None:
            ran[index] += 1

        hooks.append(block.register_forward_pre_hook(count))
    generator = torch.Generator().manual_seed(1)
    size = (1, 3, config.in_channels, config.sample_height, config.sample_width)
    text = torch.randn(1, config.max_text_seq_length, config.text_embed_dim, generator=generator)
    out = transformer(torch.randn(size, generator=generator), text, torch.tensor([500]), return_dict=False)[0]
    out.square().mean().backward()
    for hook in hooks:
        hook.remove()
    gradients = [parameter.grad.clone() for parameter in transformer.parameters() if parameter.grad is not None]
    transformer.zero_grad()
    return ran, gradients


def test_recomputed_blocks_give_equal_gradients_to_the_bit(transformer: Any) -> None:
    plain, expected = passed(transformer)
    assert plain == [1] * len(plain)
    for every in (1, 2, 3):
        recompute(transformer, DeepSpeedConfig(activation_checkpointing=True, checkpoint_every_block=every))
        ran, gradients = passed(transformer)
        assert ran == [2 if index % every == 0 else 1 for index in range(len(plain))]
        assert len(gradients) == len(expected) and all(map(torch.equal, gradients, expected))
