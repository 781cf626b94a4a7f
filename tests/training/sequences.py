"""Program of the tests' server: compare sequence parallelism on two ranks with one rank.

With the word FOLDER it runs forward and backward passes of small transformers on both ranks and on one; then whole
trainings with sequence parallelism, stopped and resumed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import CogVideoXTransformer3DModel

from cogflow.config.deepspeed_section import DeepSpeedConfig
from cogflow.errors import QualityGateError
from cogflow.models import tiny
from cogflow.models.transformer_inputs import rotary_tables
from cogflow.runtime import ranks
from cogflow.training import sequence
from cogflow.training.recomputation import recompute
from cogflow.training.sequence import RankPlacement, split
from tests.training import resuming

BASE = {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16, "sample_width": 6, "sample_height": 6}
TRAITS: dict[str, dict[str, Any]] = {
    "5b": {},
    "2b": {"use_rotary_positional_embeddings": False},
    "5b-i2v": {"in_channels": 32, "use_learned_positional_embeddings": True},
    "1.5": {"patch_size_t": 2, "patch_bias": False},
    "1.5-i2v": {"in_channels": 32, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 64},
}
CASES: dict[str, dict[str, Any]] = {
    # 27 tokens of video (3 x 3 x 3), 7 of text: neither divides.
    "5b": {"kind": "5b", "text": 7},
    "even": {"kind": "5b", "text": 8, "frames": 4},
    "recomputed": {"kind": "5b", "text": 7, "every": 1},
    "every other block recomputed": {"kind": "5b", "text": 7, "every": 2},
    "one word": {"kind": "5b", "text": 1},  # one rank has no text at all
    "two clips": {"kind": "5b", "text": 7, "batch": 2},
    "2b": {"kind": "2b", "text": 7, "every": 2},
    "5b-i2v": {"kind": "5b-i2v", "text": 7},
    "1.5": {"kind": "1.5", "text": 7, "frames": 6, "every": 1},
    "1.5-i2v": {"kind": "1.5-i2v", "text": 7, "frames": 2},
    "bf16": {"kind": "5b", "text": 7, "every": 1, "dtype": torch.bfloat16},
}


def transformer(kind: str, text: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = {key: value for key, value in tiny.new_transformer().config.items() if not key.startswith("_")}
    made = CogVideoXTransformer3DModel(**(config | BASE | {"max_text_seq_length": text} | TRAITS[kind]))
    # Random instead of diffusers' zeros and ones, so that no gradient is zero because of a zero weight.
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return (made if dtype == torch.float32 else made.to(dtype)).train()


def passed(
    made: Any, text: int, place: RankPlacement, frames: int = 3, batch: int = 1
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return the prediction, the loss and the gradients of all parameters."""
    config, dtype = made.config, made.dtype
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(
        batch, frames, config.in_channels, config.sample_height, config.sample_width, generator=generator
    )
    embeds = torch.randn(batch, text, config.text_embed_dim, generator=generator)
    target = torch.randn(batch, frames, config.out_channels, *latents.shape[-2:], generator=generator)
    tables = rotary_tables(made, frames, config.sample_height, config.sample_width, torch.device("cpu"))
    extra = {"ofs": torch.full((1,), 2.0, dtype=dtype)} if config.ofs_embed_dim else {}
    out = made(
        hidden_states=latents.to(dtype),
        encoder_hidden_states=embeds.to(dtype),
        timestep=torch.arange(400, 400 + batch),
        image_rotary_emb=tables,
        return_dict=False,
        **extra,
        **place.forward_arguments(),
    )[0]
    loss = (out.float() - target).square().mean()
    loss.backward()
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in made.parameters()]
    made.zero_grad()
    return out.detach(), loss.detach(), gradients


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    """Return the norm of the difference divided by the norm."""
    return float((one.double() - two.double()).norm() / two.double().norm())


def case(
    kind: str,
    text: int,
    frames: int = 3,
    batch: int = 1,
    every: int = 0,
    dtype: torch.dtype = torch.float32,
    size: int = 2,
) -> dict[str, Any]:
    """Return the relative differences between the passes on two ranks and on one, whether parameter names stayed, and
    whether the transformer still runs alone.
    """
    plain, shared = transformer(kind, text, dtype), transformer(kind, text, dtype)
    for one in (plain, shared):
        recompute(one, DeepSpeedConfig(activation_checkpointing=every > 0, checkpoint_every_block=max(1, every)))
    split(shared, size)
    alone, place = RankPlacement(), RankPlacement(size)
    out, loss, gradients = passed(plain, text, alone, frames, batch)
    tokens: list[int] = []
    hook = shared.transformer_blocks[1].ff.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    found, own_loss, own = passed(shared, text, place, frames, batch)
    hook.remove()
    for gradient in own:  # as DeepSpeed averages them
        dist.all_reduce(gradient)
        gradient /= ranks.world_size()
    by_itself = passed(shared, text, alone, frames, batch)
    names = [name for name, _ in plain.named_parameters()]
    largest = max(float(gradient.norm()) for gradient in gradients)
    # Tiny gradients are only rounding errors, so they are compared with the largest gradient.
    each = {
        name: float((two.double() - one.double()).norm()) / max(float(one.norm()), 1e-4 * largest)
        for name, one, two in zip(names, gradients, own, strict=True)
    }
    return {
        "out": apart(found, out),
        "loss": abs(float(own_loss) - float(loss)) / float(loss),
        "same loss": len(set(ranks.gather(float(own_loss)))) == 1,
        "gradients": apart(torch.cat([one.flatten() for one in own]), torch.cat([one.flatten() for one in gradients])),
        "worst gradient": max(each.values()),
        "which": max(each, key=lambda name: each[name]),
        "missing": [name for name, one in zip(names, gradients, strict=True) if not one.any()],
        "names": list(plain.state_dict()) == list(shared.state_dict()),
        "by itself": all(
            torch.equal(one, two) for one, two in zip([by_itself[0], *by_itself[2]], [out, *gradients], strict=True)
        ),
        "tokens": tokens,
    }


SHARED = ("parallel.sequence=2", "stage.batch_size=2")
"""Options for a step with as many clips as one rank takes in two micro steps."""


def trained(root: Path, zero: str, *more: str) -> dict[str, Any]:
    """Train an uninterrupted run with sequence parallelism and three sampled prompts on two ranks, and one that a
    signal stopped.
    """
    prompts = root / "prompts.txt"
    if ranks.is_main():
        prompts.write_text("a red circle\na blue square\na green star\n")
    whole, name, words = f"{zero}-shared", f"{zero}-shared-stopped", [f"deepspeed={zero}", *SHARED, *more]
    resuming.train(root, whole, *words, "stage.sample_every=6", f"sampling.prompts={prompts}")
    with resuming.signalled((2, 1), rank=-1) as seen:
        codes = [resuming.train(root, name, *words)]
    fired = len(ranks.gather(seen)[-1])
    codes.append(resuming.train(root, name, *words))
    found = {"codes": codes, "fired": fired, "whole": left(root / whole), "stopped": left(root / name)}
    if ranks.is_main():
        found["samples"] = [
            json.loads((root / whole / f"samples/step-{step:06d}/samples.json").read_text())["samples"]
            for step in (0, resuming.STEPS)
        ]
    return found


def apart_later(root: Path) -> dict[str, Any]:
    """Train two and a half steps with sequence parallelism, the rest with a batch for each rank."""
    with resuming.signalled((2, 1)):
        resuming.train(root, "apart-later", "deepspeed=zero2", *SHARED)
    resuming.train(root, "apart-later", "deepspeed=zero2", "stage.batch_size=1")
    return left(root / "apart-later")


def lost(root: Path) -> dict[str, Any]:
    """Make a gradient not finite among the second rank's tokens only, in the second step; return how each rank ends,
    and says.
    """
    back, seen, said = sequence._Exchange.backward, [0], ""

    def broken(ctx: Any, *grads: torch.Tensor) -> Any:
        found = back(ctx, *grads)
        seen[0] += 1
        if seen[0] == 10 and ranks.rank() == 1:  # 2 blocks x 2 exchanges x 2 micro steps before it
            found[0].view(-1)[0] = float("inf")
        return found

    sequence._Exchange.backward = staticmethod(broken)  # type: ignore[method-assign]
    try:
        resuming.train(root, "lost", "deepspeed=zero3", *SHARED)
    except QualityGateError as error:
        said = str(error)
    finally:
        sequence._Exchange.backward = staticmethod(back)  # type: ignore[method-assign]
    return {"said": ranks.gather(said), "exchanges": ranks.gather(seen[0])}


def left(folder: Path) -> dict[str, Any]:
    ranks.barrier()
    return resuming.left(folder) if ranks.is_main() else {}


def main(arguments: Sequence[str]) -> None:
    """Run all cases; FOLDER holds ``prepared/cache`` and ``model``, and rank 0 writes the results into it."""
    root = Path(arguments[0])
    ranks.setup()
    passes = ranks.gather({name: case(**given) for name, given in CASES.items()})
    trainings = {
        "zero2": trained(root, "zero2", "deepspeed.activation_checkpointing=true"),  # whose blocks keep what fits
        "zero3": trained(root, "zero3", "deepspeed.activation_checkpointing=true"),
        "apart later": apart_later(root),
        "lost": lost(root),
    }
    if ranks.is_main():
        (root / "sequences.json").write_text(json.dumps({"passes": passes, **trainings}))
    ranks.close()
