"""Make one example of every kind of place that users give to a stage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from cogflow.files.atomic_write import write_json
from cogflow.files.publish import publish_folder, write_manifest
from cogflow.models import tiny

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
TRANSFORMER = tiny.folder() / "transformer"
MODEL = {"name": "tiny", "path": str(tiny.folder()), "dtype": "auto"}
PICTURE = b"\x89PNG\r\n\x1a\n"  # no stage decodes it before the kind of its folder is decided


def run(root: Path) -> Path:
    for step in (2, 4):
        checkpoint(root / "run" / "checkpoints" / f"step-{step:06d}", step)
    return root / "run"


def checkpoint(target: Path, step: int = 4) -> Path:
    with publish_folder(target) as folder:
        shutil.copytree(TRANSFORMER, folder / "transformer")
        write_json(folder / "trainer.json", {"step": step, "family": "tiny", "model": MODEL, "trained_with": {}})
    return target


def run_without_checkpoints(root: Path) -> Path:
    (root / "run").mkdir()
    (root / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    (root / "run" / "export.json").write_text("{}")  # the record of stage=export, whose output was elsewhere
    return root / "run"


def run_with_a_pipeline(root: Path) -> Path:
    pipeline(root / "run" / "pipeline")
    return root / "run"


def pipeline(target: Path) -> Path:
    shutil.copytree(tiny.folder(), target, ignore=shutil.ignore_patterns("recipe.json", "manifest.json"))
    return target


def pipeline_with_a_picture(root: Path) -> Path:
    (pipeline(root / "pipeline") / "preview.png").write_bytes(PICTURE)
    return root / "pipeline"


def pipeline_with_empty_checkpoints(root: Path) -> Path:
    (pipeline(root / "pipeline") / "checkpoints").mkdir()
    return root / "pipeline"


def pipeline_with_checkpoints(root: Path) -> Path:
    checkpoint(pipeline(root / "pipeline") / "checkpoints" / "step-000004")
    return root / "pipeline"


def export(root: Path) -> Path:
    shutil.copytree(TRANSFORMER, root / "export" / "transformer")
    write_json(root / "export" / "export.json", {"step": 4, "weights": "model", "model": MODEL, "trained_with": {}})
    write_manifest(root / "export")
    return root / "export"


def component(root: Path) -> Path:
    shutil.copytree(TRANSFORMER, root / "mine")
    return root / "mine"


def components(root: Path) -> Path:
    shutil.copytree(TRANSFORMER, root / "model" / "transformer")
    shutil.copytree(tiny.folder() / "vae", root / "model" / "vae")
    return root / "model"


def component_with_optimizer(root: Path) -> Path:
    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}, component(root) / "optimizer.bin")
    return root / "mine"


def optimizer_beside_weights(root: Path) -> Path:
    """Write what accelerate saves: the model's config.json is not there."""
    (root / "saved").mkdir()
    save_file({"proj_out.weight": torch.ones(2)}, root / "saved" / "model.safetensors")
    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}, root / "saved" / "optimizer.bin")
    return root / "saved"


def deepspeed(root: Path) -> Path:
    folder = root / "saved" / "global_step7"
    folder.mkdir(parents=True)
    (root / "saved" / "latest").write_text("global_step7")
    module = {f"module.transformer_blocks.{number}.norm1.linear.weight": torch.ones(2) for number in range(2)}
    torch.save({"module": module, "global_steps": 7}, folder / "mp_rank_00_model_states.pt")
    return root / "saved"


def sat_vae(root: Path) -> Path:
    names = ("encoder.down.0.block.0.norm1.weight", "decoder.up.0.block.0.norm1.norm_layer.weight")
    torch.save({"state_dict": {name: torch.ones(1) for name in names}}, root / "3d-vae.pt")
    return root / "3d-vae.pt"


def file(name: str, content: bytes = b"") -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        return root / name

    return make


def folder_of(*names: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        (root / "folder").mkdir()
        for name in names:
            (root / "folder" / name).write_bytes(PICTURE)
        return root / "folder"

    return make


PLACES: dict[str, Callable[[Path], Path]] = {
    "run": run,
    "run without checkpoints": run_without_checkpoints,
    "run with a pipeline": run_with_a_pipeline,
    "checkpoint": lambda root: checkpoint(root / "step-000004"),
    "checkpoint of another name": lambda root: checkpoint(root / "best"),
    "pipeline": lambda root: pipeline(root / "pipeline"),
    "pipeline with a picture": pipeline_with_a_picture,
    "pipeline named finetune-step-500": lambda root: pipeline(root / "finetune-step-500"),
    "pipeline with empty checkpoints/": pipeline_with_empty_checkpoints,
    "pipeline with checkpoints": pipeline_with_checkpoints,
    "export": export,
    "component": component,
    "components": components,
    "component with optimizer.bin": component_with_optimizer,
    "optimizer.bin beside model.safetensors": optimizer_beside_weights,
    "SAT folder": lambda root: GOLDEN / "sat" / "2b",
    "SAT step folder": lambda root: GOLDEN / "sat" / "2b" / "500",
    "SAT file": lambda root: GOLDEN / "sat" / "2b" / "500" / "mp_rank_00_model_states.pt",
    "DeepSpeed folder": deepspeed,
    "DeepSpeed folder, ZeRO 2": lambda root: GOLDEN / "zero" / "stage2-bf16",
    "DeepSpeed folder, ZeRO 3": lambda root: GOLDEN / "zero" / "stage3-bf16",
    "3d-vae.pt": sat_vae,
    "video file": file("clip.mp4"),
    "folder of videos": folder_of("a.mp4", "b.mp4", "contact.png"),
    "folder of videos with embeddings": folder_of("a.mp4", "embeddings.pt"),
    "folder of frames": folder_of("00000.png", "00001.png"),
    "empty folder": folder_of(),
    "missing path": lambda root: root / "missing",
    "text file": file("notes.txt", b"hello"),
}
