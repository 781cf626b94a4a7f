"""A prepared cache of a few drawn clips, and the shipped model's sampler over it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogflow.config.config import Config
from cogflow.config.data_section import DataConfig
from cogflow.config.model_section import ModelConfig
from cogflow.config.run_section import RunConfig
from cogflow.config.sampling_section import SamplingConfig
from cogflow.config.train_settings import PrepareStage, TrainStage
from cogflow.data.latent_cache import LatentCache
from cogflow.data.preparation import EncoderInputs, prepare
from cogflow.data.shapes import draw_folder
from cogflow.models import loading, tiny
from cogflow.sampling.sampler import Sampler

CLIPS = 4


@dataclass(frozen=True)
class World:
    folder: Path
    config: Config[TrainStage]
    cache: LatentCache
    sampler: Callable[..., Sampler]


class _Bar:
    def advance(self, n: int = 1, note: str = "") -> None:
        pass


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Tests must not write into ``folder``: they give the rungs one of their own."""
    folder = tmp_path_factory.mktemp("rungs") / "run"
    data = DataConfig(clips=CLIPS, holdout=1)
    sampling = SamplingConfig(steps=2, roundtrip_clips=2)
    config = Config(
        stage=PrepareStage(),
        run=RunConfig(str(folder.parent), folder.name),
        model=ModelConfig(),
        data=data,
        sampling=sampling,
    )
    draw_folder(folder / "data", data)
    vae = loading.load_vae(tiny.folder())
    prepare(
        config,
        load_vae=lambda: vae,
        load_text=lambda: lambda texts: torch.zeros(len(texts), 32, 64),
        folder=folder / "cache",
        clips_folder=folder / "data",
        inputs=EncoderInputs({"vae": "v", "text_encoder": "t"}, max_length=32),
        report=lambda total, description: nullcontext(_Bar()),
    )
    transformer = loading.load_transformer(tiny.folder(), torch.float32)
    scheduler = loading.load_scheduler(tiny.folder())

    def sampler(**settings: Any) -> Sampler:
        return Sampler(
            transformer,
            vae,
            scheduler,
            torch.zeros(32, 64),
            replace(sampling, **settings),
            frames=data.frames,
            height=data.height,
            width=data.width,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )

    return World(folder, config.with_stage(TrainStage()), LatentCache(folder / "cache"), sampler)
