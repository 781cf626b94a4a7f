"""Test untrusted files: pickles that would run code, names that point outside, code in a pipeline folder.

The exit code is 2, and no code ran.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogflow.models import tiny
from tests.faults.conftest import server_says
from tests.faults.server import Done, Server

pytestmark = pytest.mark.slow


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def run(server: Server, stage: str, root: Path, *words: str) -> Done:
    return server.run(f"stage={stage}", "debug=quick", f"run.root={root}", "run.name=run", *words, seconds=60)


WEIGHTS = {"a.weight": torch.ones(2, 3)}
PICKLES: dict[str, Callable[[Any], Any]] = {
    "bare": lambda payload: payload,
    "beside": lambda payload: {"module": WEIGHTS, "iteration": payload},
    "nested": lambda payload: {"module": WEIGHTS | {"x": [{"deep": (payload,)}]}},
    "a key": lambda payload: {"module": WEIGHTS, "rng": [payload, payload]},
}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_a_pickle_that_would_run_code_is_refused_by_export(server: Server, tmp_path: Path, new: bool) -> None:
    canary = tmp_path / "canary"
    for name, wrap in PICKLES.items():
        file = tmp_path / name.replace(" ", "-") / "1" / "mp_rank_00_model_states.pt"
        file.parent.mkdir(parents=True)
        (file.parent.parent / "latest").write_text("1")
        torch.save(wrap(Payload(canary)), file, _use_new_zipfile_serialization=new)
        for source in (file, file.parent.parent):
            done = run(server, "export", tmp_path, f"stage.source={source}")
            server_says(done, 2, "CheckpointError", file.name, "system to be read")
            assert not canary.exists(), (name, source)
    torch.load(file, weights_only=False)
    assert canary.exists(), "the payload would not have done anything"


def test_a_pickle_in_deepspeeds_states_is_refused_by_export(server: Server, tmp_path: Path, repository: Path) -> None:
    canary, state = tmp_path / "canary", tmp_path / "deepspeed" / "state"
    shutil.copytree(repository / "tests/golden/zero/stage2-bf16", state)
    files = sorted(state.rglob("*.pt"))
    assert len(files) > 1
    for file in files:
        held = file.read_bytes()
        content = torch.load(file, weights_only=False)
        torch.save(content | {"extra": {"nested": [Payload(canary)]}}, file)
        done = run(server, "export", tmp_path, f"stage.source={state}")
        server_says(done, 2, "CheckpointError", "system to be read")
        assert not canary.exists(), file.name
        file.write_bytes(held)


def outside(tmp_path: Path) -> Path:
    """Return a file whose opening hangs."""
    pipe = tmp_path / "outside.safetensors"
    if not pipe.exists():
        os.mkfifo(pipe)
    return pipe


def component(tmp_path: Path, name: str, shard: str) -> Path:
    """Return a transformer folder whose index names ``shard``; where that is a link, it points outside."""
    folder = tmp_path / name / "transformer"
    folder.mkdir(parents=True)
    shutil.copy(tiny.folder() / "transformer" / "config.json", folder)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": shard}})
    )
    return folder


def test_an_index_that_points_outside_is_refused_unopened(server: Server, tmp_path: Path) -> None:
    for name, shard in {
        "up": "../../outside.safetensors",
        "absolute": str(outside(tmp_path)),
        "link": "link.safetensors",
    }.items():
        folder = component(tmp_path, name, shard)
        if name == "link":
            (folder / shard).symlink_to(outside(tmp_path))
        server_says(run(server, "export", tmp_path, f"stage.source={folder}"), 2, "CheckpointError", shard)
        if name != "link":
            shutil.copytree(
                tiny.folder(), folder.parent, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer")
            )
            server_says(
                run(server, "prepare", tmp_path, f"model.path={folder.parent}"),
                2,
                "PipelineError",
                shard,
                "does not lie beside it",
            )


def test_a_clip_list_that_points_outside_is_refused_unopened(server: Server, tmp_path: Path) -> None:
    pipe = tmp_path / "outside.mp4"
    os.mkfifo(pipe)
    for name in ("../outside.mp4", str(pipe), "link.mp4"):
        folder = tmp_path / "clips"
        folder.mkdir(exist_ok=True)
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a circle"}) + "\n")
        if name == "link.mp4" and not (folder / name).is_symlink():
            (folder / name).symlink_to(pipe)
        server_says(run(server, "prepare", tmp_path, "data=folder", f"data.path={folder}"), 2, "DataError", name)


def test_a_prompt_name_that_points_outside_is_refused(server: Server, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    for name in ("../../canary", str(tmp_path / "canary"), "a/b", ".."):
        prompts.write_text(json.dumps({"id": name, "text": "a circle"}) + "\n")
        done = run(server, "sample", tmp_path, f"stage.source={tiny.folder()}", f"stage.prompts={prompts}")
        server_says(done, 2, "DataError", "is not a plain name")
    assert not list(tmp_path.glob("canary*"))


def edited(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CODE: dict[str, tuple[Callable[[Path], None], str]] = {
    "file": (lambda folder: None, "modeling.py in"),
    "class": (
        lambda folder: edited(folder, "scheduler/scheduler_config.json", _class_name=["modeling", "Mine"]),
        "names a class in a code",
    ),
    "pipeline": (lambda folder: edited(folder, "model_index.json", custom_pipeline="modeling"), "custom_pipeline"),
    "map": (
        lambda folder: edited(folder, "text_encoder/config.json", auto_map={"AutoModel": "modeling.Mine"}),
        "auto_map",
    ),
    "library": (
        lambda folder: edited(folder, "model_index.json", vae=["modeling", "Mine"]),
        "takes vae from 'modeling'",
    ),
}


def test_code_in_a_pipeline_folder_is_refused_and_does_not_run(server: Server, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()\nclass Mine:\n    pass\n"
    for name, (change, said) in CODE.items():
        folder = tmp_path / name
        shutil.copytree(tiny.folder(), folder)
        for place in ("vae", "scheduler", "text_encoder", "."):
            (folder / place / "modeling.py").write_text(code)
        if name != "file":
            # The reference alone must be refused, too: a later download may bring the code.
            for path in folder.rglob("modeling.py"):
                path.unlink()
        change(folder)
        for stage, word in (("prepare", "model.path"), ("sample", "stage.source")):
            server_says(run(server, stage, tmp_path, f"{word}={folder}"), 2, "PipelineError", said)
            assert not canary.exists(), (name, stage)
    exec(code, {})  # noqa: S102 - the control
    assert canary.exists()
