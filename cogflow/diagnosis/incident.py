"""The pipeline of 2024: sound weights, and the settings that CogVideo's converter wrote by default for every model.

zai-org/CogVideo, tools/convert_weight_sat2hf.py at commit 34dd614: the VAE's class default for ``scaling_factor``, a hard-coded
``snr_shift_scale``, and ``--fp16`` on. They are 2B's. With 5B's weights every load succeeds, and the videos are blurry.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from cogflow.files.publish import publish_folder, write_json

WROTE = {
    "vae/config.json": {"scaling_factor": 1.15258426},
    "scheduler/scheduler_config.json": {"snr_shift_scale": 3.0, "timestep_spacing": "linspace"},
}
"""File to what it set there."""
COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")


def as_in_2024(pipeline: Path, output: Path) -> Path:
    """Write ``output``: the small ``pipeline`` (it is held in memory) as the converter would have; an earlier one is replaced."""
    with publish_folder(output, replace=True) as partial:
        shutil.copy2(pipeline / "model_index.json", partial / "model_index.json")
        for name in COMPONENTS:
            shutil.copytree(pipeline / name, partial / name)
        for file, fields in WROTE.items():
            path = partial / file
            config = json.loads(path.read_text(encoding="utf-8")) | fields
            path.unlink()
            write_json(path, config)
        for path in partial.rglob("*.safetensors"):
            halved = {
                name: value.half() if value.is_floating_point() else value for name, value in load_file(path).items()
            }
            path.unlink()
            save_file(halved, path, metadata={"format": "pt"})
    return output
