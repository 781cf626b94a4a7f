"""The tiny model with two of its five blocks, for tests that compare trainings with each other.

The cost of a step, a save and a ZeRO-3 gather is proportional to the number of blocks. Two blocks are enough for
everything that happens between blocks: prefetching, recomputing, freezing one of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from cogflow.models import tiny

BLOCKS = 2
OTHER_COMPONENTS = ("vae", "text_encoder", "tokenizer", "scheduler")


def transformer_config(**changes: Any) -> dict[str, Any]:
    """Return the config of the tiny transformer with ``changes``, for ``from_config``.

    Without diffusers' ``_use_default_values``: ``from_config`` ignores the fields that this list names.
    """
    config = tiny.new_transformer().config
    return {name: value for name, value in config.items() if not name.startswith("_")} | changes


def pipeline(folder: Path) -> Path:
    """Make and return the pipeline folder; all components but the transformer are links to the tiny model's."""
    transformer = folder / "transformer"
    weights_name = "diffusion_pytorch_model.safetensors"
    transformer.mkdir(parents=True)
    shutil.copy(tiny.folder() / "model_index.json", folder)
    for name in OTHER_COMPONENTS:
        (folder / name).symlink_to(tiny.folder() / name)
    config = json.loads((tiny.folder() / "transformer" / "config.json").read_text())
    (transformer / "config.json").write_text(json.dumps(config | {"num_layers": BLOCKS}))
    left_out = tuple(f"transformer_blocks.{block}." for block in range(BLOCKS, config["num_layers"]))
    weights = load_file(tiny.folder() / "transformer" / weights_name)
    save_file(
        {key: value for key, value in weights.items() if not key.startswith(left_out)},
        transformer / weights_name,
        {"format": "pt"},
    )
    return folder
