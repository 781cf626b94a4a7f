"""Test that training starts from the weights that ``stage.start`` names, and refuses weights that do not fit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogflow.models import tiny
from tests.faults.conftest import World, server_says
from tests.faults.server import Server

pytestmark = pytest.mark.slow

STILL = ["stage.steps=1", "stage.learning_rate=1e-30", "stage.save_every=0"]
"""One step that changes no bit of a weight."""


EXPORTED = {"run": "ema", "checkpoint": "ema"}


@pytest.fixture(scope="module")
def world(server: Server, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return runs of the tiny model itself, because weights in SAT's layout are compared with its facts."""
    return World(tmp_path_factory.mktemp("starting"), server, prepared, tiny.folder())


@pytest.fixture(scope="module")
def trained(world: World) -> Path:
    """Return a run whose weights and EMA differ from the model's weights and from each other."""
    words = [
        "stage.steps=4",
        "stage.learning_rate=1e-3",
        "stage.ema_decay=0.5",
        "stage.save_every=2",
        "model.dtype=bf16",
        "deepspeed=zero2",
    ]
    server_says(world.train("trained", *words), 0)
    return world.root / "trained"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name].float(), two[name].float()) for name in one)


def export(world: World, run: Path, output: Path, *more: str) -> Path:
    words = ["stage=export", "debug=quick", f"run.root={world.root}", f"run.name={run.name}", f"stage.output={output}"]
    server_says(world.server.run(*words, *more), 0)
    return output


@pytest.mark.parametrize(
    ("kind", "zero", "ranks"),
    [("run", "zero0", 1), ("checkpoint", "zero3", 2), ("diffusers", "zero3", 1), ("sat", "zero2", 1)],
)
def test_the_initial_weights_are_those_of_the_source(
    world: World, trained: Path, tmp_path: Path, kind: str, zero: str, ranks: int
) -> None:
    source = {
        "run": lambda: trained,
        "checkpoint": lambda: trained / "checkpoints/step-000002",
        "diffusers": lambda: export(world, trained, tmp_path / "export", "stage.weights=model"),
        "sat": lambda: export(world, trained, tmp_path / "sat", "stage.weights=model", "stage.to=sat"),
    }[kind]()
    # A run is started from as it would be exported: from its averages.
    expected = weights(
        trained
        / "checkpoints"
        / ("step-000002" if kind == "checkpoint" else "step-000004")
        / EXPORTED.get(kind, "transformer")
    )
    done = world.train(f"from-{kind}", *STILL, f"stage.start={source}", f"deepspeed={zero}", ranks=ranks)
    server_says(done, 0, f"starting from {source}")
    found = weights(world.root / f"from-{kind}" / "checkpoints/step-000001/transformer")
    assert same(found, expected) and not same(found, weights(world.model / "transformer"))


def test_training_starts_from_the_model_without_stage_start(world: World) -> None:
    server_says(world.train("from-model", *STILL, "deepspeed=zero3"), 0)
    assert same(
        weights(world.root / "from-model/checkpoints/step-000001/transformer"), weights(world.model / "transformer")
    )


def test_weights_trained_for_another_schedule_are_refused(world: World, trained: Path, tmp_path: Path) -> None:
    """Weights trained with one SNR shift are refused beside a scheduler with another."""
    copy = tmp_path / "pipeline"
    shutil.copytree(world.model, copy)
    path = copy / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"snr_shift_scale": 3.0}))
    done = world.train("other-facts", *STILL, f"stage.start={trained}", f"model.path={copy}")
    server_says(done, 2, "snr_shift_scale: the weights were trained with 1.0, the pipeline folder has 3.0")
    assert not (world.root / "other-facts/checkpoints").exists()


def test_weights_of_another_model_are_refused_with_their_tensor_names(
    world: World, trained: Path, tmp_path: Path
) -> None:
    folder = export(world, trained, tmp_path / "export")
    [path] = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    del tensors["proj_out.bias"]
    tensors["proj_out.weight"] = tensors["proj_out.weight"][:-1].contiguous()
    save_file(tensors, path)
    (folder / "manifest.json").unlink(missing_ok=True)
    done = world.train("other-weights", *STILL, f"stage.start={folder}")
    server_says(done, 2, "missing: proj_out.bias", "shape: proj_out.weight is")
    assert not (world.root / "other-weights/checkpoints").exists()


def test_a_start_that_does_not_exist_is_a_user_error(world: World) -> None:
    server_says(world.train("nowhere", *STILL, "stage.start=/nowhere/at/all"), 2, "/nowhere/at/all")


def test_a_killed_compilation_is_reported_and_not_waited_for(world: World, tmp_path: Path) -> None:
    lock = tmp_path / "py" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = world.train("broken-off", "deepspeed=zero2_offload", env=env)
    server_says(done, 2, "was killed", f"rm -r {lock.parent}")


def test_a_missing_compiler_names_settings_that_need_none(world: World, tmp_path: Path) -> None:
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "/nowhere/g++"}
    done = world.train("no-compiler", "deepspeed=zero2_offload", env=env)
    server_says(done, 2, "could not be compiled", "deepspeed=zero2")
    assert "Traceback" not in done.text and not world.checkpoints("no-compiler")
