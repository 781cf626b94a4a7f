"""Test that stopped and resumed runs equal an uninterrupted run to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import small
from tests.conftest import Command
from tests.faults.server import Server
from tests.permissions import current_umask, wrong_permissions
from tests.stages.conftest import losses


def beside(flow: Path, name: str) -> list[str]:
    """Return words that train on the prepared clips of ``flow`` in a new run."""
    folder = flow.parent / name
    folder.mkdir()
    shutil.copytree(flow / "cache", folder / "cache")
    return [
        "stage=train",
        "debug=quick",
        f"run.root={flow.parent}",
        f"run.name={name}",
        f"data.path={flow / 'data'}",
        "stage.sample_every=0",
    ]


def weights(folder: Path) -> bytes:
    return (folder / "checkpoints/step-000004/transformer/diffusion_pytorch_model.safetensors").read_bytes()


def test_a_signal_saves_and_the_same_command_resumes(flow: Path, cogflow: Command, server: Server) -> None:
    words = [*beside(flow, "signalled"), "stage.save_every=0", "tracking.wandb=disabled"]
    folder = flow.parent / "signalled"
    done = server.run(*words, fault="usr1@update#2")
    assert done.codes == [75] and done.fired == ["usr1@update#2"], done.text[-3000:]
    assert len(losses(folder)) == 2 and (folder / "checkpoints/step-000002").is_dir()
    cogflow(*words)
    # Validation in the one, none in the other; stopped in one, not in the other.
    assert losses(folder) == losses(flow) and weights(folder) == weights(flow)
    assert wrong_permissions(folder / "checkpoints", current_umask()) == []


def test_a_broken_checkpoint_is_skipped(flow: Path, cogflow: Command) -> None:
    words = beside(flow, "broken")
    folder = flow.parent / "broken"
    shutil.copytree(flow / "checkpoints", folder / "checkpoints")
    states = next((folder / "checkpoints/step-000004/deepspeed/state").glob("*optim_states.pt"))
    with states.open("r+b") as file:
        file.seek(1000)
        file.write(b"\x00\xff\x00\xff")
    done = cogflow(*words)
    assert "skipped: step-000004" in done.stdout and "after step 2" in done.stdout
    assert weights(folder) == weights(flow)


def test_recomputed_activations_train_the_same(flow: Path, cogflow: Command) -> None:
    cogflow(*beside(flow, "recomputed"), "stage.save_every=0", "deepspeed.activation_checkpointing=true")
    for (_, loss, norm), (_, other, other_norm) in zip(losses(flow), losses(flow.parent / "recomputed"), strict=True):
        assert other == pytest.approx(loss, rel=1e-5) and other_norm == pytest.approx(norm, rel=1e-4)


def test_another_batch_size_is_refused_with_both_values(flow: Path, cogflow: Command) -> None:
    done = cogflow(
        "stage=train", "debug=quick", f"run.root={flow.parent}", "run.name=flow", "stage.batch_size=4", code=2
    )
    assert "stage.batch_size: 2 then, 4 now" in done.stderr


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.pipeline(tmp_path_factory.mktemp("model") / "small")


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_two_ranks_train_what_one_rank_trains(flow: Path, two_blocks: Path, cogflow: Command, zero: str) -> None:
    """tests/launch and tests/slurm start ranks as users do."""
    one, two = f"one-{zero}", f"two-{zero}"
    common = ["stage.steps=3", "stage.save_every=0", f"deepspeed={zero}", f"model.path={two_blocks}"]
    cogflow(*beside(flow, one), *common, "stage.gradient_accumulation=2")
    extra = ["stage.sample_every=3", "stage.ema_decay=0.9", "sampling.seeds=[0]", f"sampling.prompts={prompts(flow)}"]
    words = [word for word in beside(flow, two) if word != "stage.sample_every=0"]
    cogflow(*words, *common, *extra, ranks=2)
    for (_, loss, norm), (_, other, other_norm) in zip(
        losses(flow.parent / one), losses(flow.parent / two), strict=True
    ):
        assert other == pytest.approx(loss, rel=1e-5) and other_norm == pytest.approx(norm, rel=1e-4)
    # Three prompts on two ranks: none is missing.
    assert len(list((flow.parent / two / "samples/step-000003").glob("*.mp4"))) == 3
    assert (flow.parent / two / "checkpoints/step-000003/ema/config.json").is_file()


def prompts(flow: Path) -> Path:
    path = flow.parent / "prompts.txt"
    path.write_text(
        "a red circle moves left over a light background\na purple star moves up over a dark background\nempty\n"
    )
    return path
