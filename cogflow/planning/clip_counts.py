"""How many clips a training will go through, and how many samples a validation makes, as far as that shows before preparing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogflow.artifacts.run_layout import RunLayout
from cogflow.config.config import Config
from cogflow.config.train_settings import TrainStage
from cogflow.data.cache import LatentCache, split
from cogflow.data.clip_index import read_index
from cogflow.errors import DataError
from cogflow.sampling.prompts import FROM_DATA, SHAPES_PROMPTS, read_prompts


@dataclass(frozen=True)
class Clips:
    """``training``: clips without the held-out ones, ``None`` where that is not known yet; ``source`` says why."""

    training: int | None
    holdout: int
    source: str
    size_differs: bool = False


def clips(config: Config[TrainStage], run: Path) -> Clips:
    """Counted in the prepared clips, else in the list of the folder, where every clip is taken for readable and single."""
    data = config.data
    if (RunLayout(run).cache / "index.json").is_file():
        try:
            cache = LatentCache(RunLayout(run).cache)
            return Clips(
                len(cache.train), len(cache.holdout), f"prepared in {cache.folder}", bool(cache.mismatches(data))
            )
        except DataError as error:
            return Clips(None, data.holdout, error.message)
    if data.name == "shapes" and not (data.path and Path(data.path).expanduser().is_dir()):
        return _divided(data.clips, data.holdout, f"data.clips={data.clips}, to be drawn")
    if data.path is None:
        return Clips(None, data.holdout, "data.path is not given")
    try:
        return _divided(len(read_index(Path(data.path).expanduser())), data.holdout, f"listed in {data.path}")
    except DataError as error:
        return Clips(None, data.holdout, error.message)


def _divided(count: int, holdout: int, source: str) -> Clips:
    train, held = split([str(position) for position in range(count)], holdout)
    return Clips(len(train), len(held), source)


def prompts(config: Config[TrainStage]) -> tuple[int, str]:
    """How many prompts a validation samples, and where they come from."""
    if config.sampling.prompts is not None:
        try:
            return len(read_prompts(Path(config.sampling.prompts).expanduser())), config.sampling.prompts
        except DataError as error:
            return FROM_DATA, f"{FROM_DATA} assumed: {error.message}"
    if config.data.name == "shapes":
        return len(SHAPES_PROMPTS), "those of drawn clips"
    return FROM_DATA, "the first captions that are held out"
