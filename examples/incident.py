"""Replay CogVideo issue 236 on the tiny model: train, convert with another model's settings, diagnose, repair.

    python -m examples.incident [OVERRIDES...]

In 2024 a full finetune of CogVideoX-5B gave blurry videos after conversion. The converter (zai-org/CogVideo,
tools/convert_weight_sat2hf.py at commit 34dd614) left the VAE's ``scaling_factor`` at its class default, wrote a
hard-coded ``snr_shift_scale`` and ``timestep_spacing``, and stored the weights in fp16. These are the settings of
CogVideoX-2B. The weights were undamaged, and every load succeeded.

The example runs ``stage=flow`` on the tiny model, writes ``<run>/pipeline-2024`` with the converter's settings, and
runs ``stage=diagnose`` on it with ``<run>/pipeline`` as the reference. The diagnosis must exit with code 3 and write
``<run>/repaired``. OVERRIDES are options of the command line of cogflow; those of ``stage.`` apply to the flow only.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from cogflow.config.compose import compose
from cogflow.files.atomic_write import write_json
from cogflow.files.paths import run_folder
from cogflow.files.publish import publish_folder

SETTINGS = (
    "run.name=incident",
    "data.clips=48",
    "sampling.steps=10",
    "stage.train.steps=60",
    "stage.train.save_every=60",
    "stage.train.sample_every=30",
    "stage.train.evaluate_every=10",
)
"""Options of the replay, which takes three minutes on two CPU cores."""

CONVERTER_VALUES = {
    "vae/config.json": {"scaling_factor": 1.15258426},
    "scheduler/scheduler_config.json": {"snr_shift_scale": 3.0, "timestep_spacing": "linspace"},
}
"""Config file -> fields that the converter of 2024 wrote into it."""

COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")


def main(overrides: Sequence[str]) -> int:
    """Run the replay; return 0 when the diagnosis found and repaired the pipeline of 2024, else 1."""
    options = [*SETTINGS, *overrides]
    run = run_folder(compose(["stage=flow", *options]).run)
    if code := cogflow("stage=flow", *options):
        return code
    converted = convert_as_in_2024(run / "pipeline", run / "pipeline-2024")
    print(f"{converted}: the same weights with the settings that CogVideo's converter wrote in 2024", flush=True)
    shared = [option for option in options if not option.startswith("stage.")]
    code = cogflow(
        "stage=diagnose",
        *shared,
        f"stage.candidate={converted}",
        f"stage.reference={run / 'pipeline'}",
        "stage.fix=true",
        f"stage.output={run / 'repaired'}",
    )
    if code != 3:
        print(f"The diagnosis must find the pipeline of 2024 faulty (exit code 3). It ended with exit code {code}.")
        return 1
    print("The diagnosis found the pipeline of 2024 faulty (exit code 3), as it must.")
    return 0


def cogflow(*options: str) -> int:
    """Run ``python -m cogflow`` with ``options`` and return its exit code."""
    return subprocess.run([sys.executable, "-m", "cogflow", *options], check=False).returncode


def convert_as_in_2024(pipeline: Path, output: Path) -> Path:
    """Write ``pipeline`` to ``output`` with the converter's settings and all weights in fp16. All weights are in
    memory.
    """
    with publish_folder(output, replace=True) as partial:
        shutil.copy2(pipeline / "model_index.json", partial / "model_index.json")
        for name in COMPONENTS:
            shutil.copytree(pipeline / name, partial / name)
        for file, fields in CONVERTER_VALUES.items():
            config = json.loads((partial / file).read_text(encoding="utf-8")) | fields
            (partial / file).unlink()
            write_json(partial / file, config)
        for path in partial.rglob("*.safetensors"):
            tensors = {
                name: value.half() if value.is_floating_point() else value for name, value in load_file(path).items()
            }
            path.unlink()
            save_file(tensors, path, metadata={"format": "pt"})
    return output


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
