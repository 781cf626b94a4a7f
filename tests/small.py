"""The tiny model with two of its five blocks, for trainings whose end is held against another's and not against the world.

A step, a save and a ZeRO-3 gather cost in proportion to the blocks. Two are enough for what happens between blocks: prefetching,
recomputing, freezing one of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from cogflow.models import tiny

BLOCKS = 2
PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")


def pipeline(folder: Path) -> Path:
    """Make the pipeline folder, whose transformer alone is its own."""
    transformer, name = folder / "transformer", "diffusion_pytorch_model.safetensors"
    transformer.mkdir(parents=True)
    shutil.copy(tiny.folder() / "model_index.json", folder)
    for part in PARTS:
        (folder / part).symlink_to(tiny.folder() / part)
    config = json.loads((tiny.folder() / "transformer" / "config.json").read_text())
    (transformer / "config.json").write_text(json.dumps(config | {"num_layers": BLOCKS}))
    left_out = tuple(f"transformer_blocks.{block}." for block in range(BLOCKS, config["num_layers"]))
    weights = load_file(tiny.folder() / "transformer" / name)
    save_file(
        {key: value for key, value in weights.items() if not key.startswith(left_out)},
        transformer / name,
        {"format": "pt"},
    )
    return folder
