"""Prepare with a tiny random autoencoder and text encoder of the genuine classes, and count the work.

As a program, with the words CLIPS CACHE SHARD_CLIPS SECONDS_PER_CLIP, it prepares in one process or several and prints
its counts and its result as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from transformers import ByT5Tokenizer, T5EncoderModel

from cogflow.config.config import Config
from cogflow.config.data_section import DataConfig
from cogflow.config.train_settings import PrepareStage
from cogflow.data.preparation import EncoderInputs, PrepareResult, prepare
from cogflow.models.loading import encode_prompts
from cogflow.runtime import ranks
from tests.random_parts import new_text_encoder, new_vae

DATA = DataConfig(name="folder", frames=5, height=32, width=32, fps=8, holdout=2, max_bad_share=0.5, max_bad_in_a_row=4)
HASHES = {"vae": "vae-1", "text_encoder": "text-1", "tokenizer": "tokens-1"}
MAX_LENGTH = 40


@cache
def small_vae() -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    vae = new_vae()
    return vae.eval().requires_grad_(False)


@cache
def small_text() -> tuple[Any, T5EncoderModel]:
    torch.manual_seed(0)
    return ByT5Tokenizer(), new_text_encoder(400, d_model=16).eval()


class Bar:
    def advance(self, n: int = 1, note: str = "") -> None:
        pass


@dataclass
class Work:
    """Count loads of models, encoded clips and captions."""

    clips: int = 0
    captions: list[str] = field(default_factory=list)
    vae_loads: int = 0
    text_loads: int = 0
    stop_after: int | None = None  # clips, then an interrupt
    seconds_per_clip: float = 0.0
    poison: bool = False

    def load_vae(self) -> Any:
        self.vae_loads += 1
        return _Counted(small_vae(), self)

    def load_text(self) -> Any:
        self.text_loads += 1
        tokenizer, encoder = small_text()

        def embed(texts: Sequence[str]) -> torch.Tensor:
            self.captions += texts
            return encode_prompts(tokenizer, encoder, texts, MAX_LENGTH)

        return embed


class _Counted:
    def __init__(self, vae: AutoencoderKLCogVideoX, work: Work) -> None:
        self._vae, self._work = vae, work
        self.device, self.dtype = vae.device, vae.dtype

    def encode(self, pixels: torch.Tensor) -> Any:
        assert len(pixels) == 1
        if self._work.stop_after is not None and self._work.clips >= self._work.stop_after:
            raise KeyboardInterrupt
        time.sleep(self._work.seconds_per_clip)
        self._work.clips += 1
        return self._vae.encode(pixels * float("nan") if self._work.poison else pixels)


def run(
    clips: Path, folder: Path, work: Work, hashes: dict[str, str] | None = None, shard_clips: int = 64, **data: Any
) -> PrepareResult:
    return prepare(
        Config(stage=PrepareStage(batch_size=3, shard_clips=shard_clips), data=replace(DATA, **data)),
        load_vae=work.load_vae,
        load_text=work.load_text,
        folder=folder,
        clips_folder=clips,
        inputs=EncoderInputs(hashes or HASHES, MAX_LENGTH),
        report=lambda total, description: nullcontext(Bar()),
    )


def main(words: Sequence[str]) -> None:
    clips, folder, shard_clips, seconds_per_clip = words
    torch.set_num_threads(1)
    ranks.setup()
    work = Work(seconds_per_clip=float(seconds_per_clip))
    result = run(Path(clips), Path(folder), work, shard_clips=int(shard_clips))
    counts = {"clips": work.clips, "captions": work.captions, "result": asdict(result)}
    print(json.dumps(counts, default=str), flush=True)
    ranks.close()


if __name__ == "__main__":
    main(sys.argv[1:])
