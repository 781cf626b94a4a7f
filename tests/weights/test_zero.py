"""Test reading ZeRO checkpoints against DeepSpeed's own converter and against vectors cut by hand.

``tests/golden/zero`` was written by ``zero_writer.py`` on two ranks (DeepSpeed 0.19.8); ``expected.safetensors``
there is the result of ``deepspeed.utils.zero_to_fp32``. The slow test writes new checkpoints.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogflow.artifacts.identify import identify
from cogflow.errors import CheckpointError
from cogflow.export.origin import open_foreign
from cogflow.weights.foreign import ForeignWeights
from cogflow.weights.torch_file import InertObject
from cogflow.weights.zero import ZeroCheckpoint, read_state_file
from tests.faults.server import Server

GOLDEN = Path(__file__).parent.parent / "golden" / "zero"
FROZEN = {"frozen.weight", "frozen.bias"}


def agree(folder: ZeroCheckpoint, expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        read = folder.read(name)
        assert torch.equal(read, value), name
        assert (
            read.dtype == folder.tensors[name].dtype == value.dtype and tuple(read.shape) == folder.tensors[name].shape
        )


def check(folder: Path, stage: int, ranks: int, expected: dict[str, torch.Tensor]) -> None:
    zero = ZeroCheckpoint(folder)
    agree(zero, expected)
    # DeepSpeed leaves out frozen parameters at stage 1, and a module under two names at every stage
    assert expected.keys() | FROZEN <= zero.tensors.keys() <= expected.keys() | FROZEN | {"tied.weight"}
    assert (zero.metadata["zero_stage"], zero.metadata["ranks"], zero.step) == (stage, ranks, 2)
    if stage < 3:
        assert torch.equal(
            zero.read("tied.weight"), zero.read("second.weight")
        )  # the master weight, not the bf16 copy in the module
    else:
        assert "tied.weight" in "".join(zero.notes)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_master_weights_equal_deepspeeds_own_conversion(stage: int) -> None:
    folder = GOLDEN / f"stage{stage}-bf16"
    expected = load_file(folder / "expected.safetensors")
    check(folder, stage, 2, expected)
    check(folder / "global_step2", stage, 2, expected)
    masters = ZeroCheckpoint(folder).read("first.weight")
    assert masters.dtype == torch.float32 and not torch.equal(
        masters, masters.bfloat16().float()
    )  # more precise than the module's copy


@pytest.mark.parametrize("stage", [1, 2])
def test_stored_weights_equal_the_module(stage: int) -> None:
    folder = GOLDEN / f"stage{stage}-bf16"
    module = torch.load(folder / "global_step2/mp_rank_00_model_states.pt", weights_only=True)["module"]
    zero = ZeroCheckpoint(folder, "bf16")
    assert zero.tensors.keys() == module.keys() and [path.name for path in zero.files] == ["mp_rank_00_model_states.pt"]
    agree(zero, module)
    assert zero.metadata["zero_stage"] == stage and zero.tensors["first.weight"].dtype == torch.bfloat16


def copied(tmp_path: Path, stage: int) -> Path:
    return Path(shutil.copytree(GOLDEN / f"stage{stage}-bf16", tmp_path / "run")) / "global_step2"


def test_stage_3_as_stored_needs_gathered_weights(tmp_path: Path) -> None:
    folder = copied(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"ZeRO-3 without gathering: 6 tensors, first.weight first"):
        ZeroCheckpoint(folder, "bf16")
    whole = ZeroCheckpoint(folder)
    path = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    states = torch.load(path, weights_only=True)
    for name in whole.tensors:
        states["module"][name] = whole.read(name).bfloat16()
    torch.save(states, path)
    assert torch.equal(ZeroCheckpoint(folder, "bf16").read("first.weight"), whole.read("first.weight").bfloat16())


def test_deepspeed_objects_are_read_as_inert_objects() -> None:
    state = read_state_file(GOLDEN / "stage2-bf16/global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")[
        "optimizer_state_dict"
    ]
    assert type(state["loss_scaler"]) is type(state["zero_stage"]) is InertObject


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    states = torch.load(path, weights_only=True)
    change(states)
    torch.save(states, path)


FIRST, SECOND = (f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2))
WHOLE, SHARD = "mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("stage", "change", "complaint"),
    [
        (2, lambda f: (f / SECOND).unlink(), "saved by 2 ranks; the optimizer states of 1 are here"),
        (2, lambda f: (f / FIRST).unlink(), r"lacks the files of ranks 0"),
        (3, lambda f: (f / SHARD).unlink(), "holds 1 model states and 2 optimizer states"),
        (2, lambda f: [(f / name).unlink() for name in (FIRST, SECOND)], "no fp32 master weights: .* in bfloat16"),
        (2, lambda f: shutil.copy(f / FIRST, f / FIRST.removeprefix("bf16_")), "two files of one rank"),
        (2, lambda f: (f / WHOLE).unlink(), f"{WHOLE} cannot be read"),
        (2, lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:3000]), "is truncated"),
        (2, lambda f: edit(f / WHOLE, lambda s: s["param_shapes"].pop()), "2 groups of parameters, .* 1"),
        (
            2,
            lambda f: edit(f / WHOLE, lambda s: s["param_shapes"][0].update(more=torch.Size([100]))),
            "more reaches beyond the end",
        ),
        (
            2,
            lambda f: edit(f / WHOLE, lambda s: s["param_shapes"][0].popitem()),
            "group 0 has 40 values, its 1 parameters need 35",
        ),
        (
            3,
            lambda f: edit(f / SHARD.replace("_1_", "_0_"), lambda s: s["param_shapes"][0].popitem()),
            "values, its parameters need",
        ),
        (2, lambda f: edit(f / WHOLE, lambda s: s.pop("param_shapes")), "has no shapes of its parameters"),
        (
            3,
            lambda f: edit(f / SHARD, lambda s: s.update(frozen_param_fragments=None)),
            "does not hold all of the frozen parameter frozen.weight",
        ),
        (2, lambda f: (f / "expp_rank_0_mp_rank_00_optim_states.pt").touch(), "mixture of experts"),
        (2, lambda f: shutil.copy(f / WHOLE, f / "mp_rank_01_model_states.pt"), "has 2 model-parallel parts"),
        (2, lambda f: shutil.rmtree(f), "names global_step2, and .* does not exist"),
        (2, lambda f: [path.unlink() for path in f.iterdir()], "holds no mp_rank_00_model_states.pt. It holds nothing"),
    ],
)
def test_damaged_checkpoints_are_refused(
    tmp_path: Path, stage: int, change: Callable[[Path], Any], complaint: str
) -> None:
    folder = copied(tmp_path, stage)
    ZeroCheckpoint(folder)
    change(folder)
    with pytest.raises(CheckpointError, match=complaint) as error:
        ZeroCheckpoint(folder.parent)
    assert error.value.exit_code == 2


def by_hand(
    folder: Path, shapes: list[dict[str, tuple[int, ...]]], ranks: int, stage: int, pad: int = 0, **state: Any
) -> dict[str, torch.Tensor]:
    """Write a checkpoint as DeepSpeed would, in fp32, and return its tensors. ``pad``: values after every parameter."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    values = {name: torch.randn(shape) for group in shapes for name, shape in group.items()}
    states: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    if stage == 3:
        for rank in range(ranks):
            stretches = []
            for value in values.values():
                share = math.ceil(value.numel() / ranks)
                padded = torch.cat([value.reshape(-1), torch.full((share * ranks - value.numel(),), 1e27)])
                stretches.append(padded[rank * share : (rank + 1) * share])
            flat = torch.cat(stretches)
            states[rank] = list(flat.split(max(5, len(flat) // 7)))  # sub-groups that end inside parameters
    else:
        for group in shapes:
            flat = torch.cat([torch.cat([values[name].reshape(-1), torch.full((pad,), 1e27)]) for name in group])
            size = math.ceil(len(flat) / (2 * ranks)) * 2
            flat = torch.cat([flat, torch.full((size * ranks - len(flat),), 1e27)])
            for rank in range(ranks):
                states[rank].append(flat[rank * size : (rank + 1) * size].clone())
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for rank in range(ranks):
        content = {key: states[rank], "partition_count": ranks, "zero_stage": stage} | state
        torch.save({"optimizer_state_dict": content}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    model = {
        "module": {name: torch.zeros(0) if stage == 3 else value.bfloat16() for name, value in values.items()},
        "param_shapes": [OrderedDict((name, torch.Size(shape)) for name, shape in group.items()) for group in shapes],
    }
    for rank in range(ranks if stage == 3 else 1):
        torch.save(model, folder / (f"zero_pp_rank_{rank}_" * (stage == 3) + "mp_rank_00_model_states.pt"))
    return values


ODD: list[dict[str, tuple[int, ...]]] = [{"a": (3, 3), "b": (1,), "c": (11,)}, {"d": (2, 1, 1)}]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 12])  # with 12 ranks, most hold only padding
@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (1, {}),
        (2, {}),
        (3, {}),
        (1, {"zero_stage": None}),
        (2, {"pad": 3, "param_alignment_paddings": [[3, 3, 3], [3]]}),
    ],
)
def test_shards_cut_by_hand_are_joined(tmp_path: Path, stage: int, ranks: int, options: dict[str, Any]) -> None:
    values = by_hand(tmp_path / "global_step1", ODD, ranks, stage, **options)
    zero = ZeroCheckpoint(tmp_path / "global_step1")
    assert zero.tensors.keys() == values.keys() and zero.metadata["zero_stage"] == stage
    agree(zero, values)


READ_ALL_AND_PRINT_MEMORY = """
import sys
from pathlib import Path

from cogflow.weights.zero import ZeroCheckpoint


def memory_without_files():
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


before = most = memory_without_files()
zero = ZeroCheckpoint(Path(sys.argv[1]))
for name in zero.tensors:
    zero.read(name).sum()
    most = max(most, memory_without_files())
print(most - before)
"""
"""Read a checkpoint in a fresh process, whose allocator holds no freed memory of other tests."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("stage", [2, 3])
def test_reading_needs_memory_for_one_tensor(tmp_path: Path, stage: int) -> None:
    """Reading 96 MiB on two ranks in tensors of 3 MiB needs far less memory: a few tensors and what the allocator
    keeps (3 to 22 MiB were measured, whatever the size of the checkpoint)."""
    by_hand(tmp_path / "step", [{f"{number:02d}": (768, 1024) for number in range(32)}], 2, stage)
    command = [sys.executable, "-c", READ_ALL_AND_PRINT_MEMORY, str(tmp_path / "step")]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert 0 < int(result.stdout) < 40 * 2**20


def opened(path: Path, masters: str = "auto") -> ForeignWeights:
    return open_foreign(identify(path), masters=masters)


def test_foreign_checkpoints_are_opened_as_masters_or_as_stored(tmp_path: Path) -> None:
    """The reader of foreign checkpoints takes the masters of a DeepSpeed folder, and the stored weights of SAT's,
    unless told otherwise."""
    names = [{"model.diffusion_model.time_embed.0.weight": (4, 4), "model.diffusion_model.time_embed.0.bias": (4,)}]
    name = "model.diffusion_model.time_embed.0.weight"
    values = by_hand(tmp_path / "global_step1", names, 2, 2)
    found = opened(tmp_path / "global_step1")
    assert found.layout == "sat" and torch.equal(found.tensors.read(name), values[name]) and len(found.files) == 3
    assert torch.equal(opened(tmp_path / "global_step1", masters="bf16").tensors.read(name), values[name].bfloat16())
    (tmp_path / "global_step1").rename(tmp_path / "500")
    found = opened(tmp_path / "500")
    assert (
        found.tensors.tensors[name].dtype == torch.bfloat16 and "masters=fp32" in found.notes[0] and found.step == 500
    )
    assert torch.equal(opened(tmp_path / "500", masters="fp32").tensors.read(name), values[name])
    (tmp_path / "500").rename(tmp_path / "500-ema")
    assert opened(tmp_path / "500-ema").tensors.tensors[name].dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="are those of the model"):
        opened(tmp_path / "500-ema", masters="fp32")
    by_hand(tmp_path / "600", names, 2, 3)
    assert torch.equal(opened(tmp_path / "600").tensors.read(name), values[name])  # there is no other copy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "kinds"), [(1, ["2-bf16", "3-bf16"]), (2, ["1-bf16", "2-bf16", "3-bf16"]), (3, ["2-fp32", "3-bf16"])]
)
def test_checkpoints_written_by_deepspeed_are_read(
    server: Server, tmp_path: Path, ranks: int, kinds: list[str]
) -> None:
    done = server.run(str(tmp_path), *kinds, ranks=ranks, seconds=500, program="tests.weights.zero_writer")
    assert done.codes == [0] * ranks, done.text[-3000:]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for kind in kinds:
        folder = tmp_path / f"stage{kind}"
        check(folder, int(kind[0]), ranks, get_fp32_state_dict_from_zero_checkpoint(str(folder)))
