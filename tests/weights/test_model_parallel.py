"""Test joining model-parallel parts that are split as SAT splits them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cogflow.errors import CheckpointError, ConversionError
from cogflow.weights.foreign import check_part_count, join_parts, part_files
from cogflow.weights.tensor_source import TensorInfo
from cogflow.weights.torch_file import TorchFile

HEAD = "model.diffusion_model."
LAYER = HEAD + "transformer.layers.0."
WIDTH = 12


class MemorySource:
    """A source of tensors in memory."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values = values
        self.tensors = {
            name: TensorInfo(name, tuple(value.shape), value.dtype, Path("x")) for name, value in values.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self.values[name]


def network(original: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        LAYER + "input_layernorm.weight": torch.randn(WIDTH),
        LAYER + f"attention.query_key_value.{original}weight": torch.randn(3 * WIDTH, WIDTH),
        LAYER + f"attention.query_key_value.{original}bias": torch.randn(3 * WIDTH),
        LAYER + f"attention.dense.{original}weight": torch.randn(WIDTH, WIDTH),
        LAYER + f"attention.dense.{original}bias": torch.randn(WIDTH),
        LAYER + "mlp.dense_h_to_4h.weight": torch.randn(4 * WIDTH, WIDTH),
        LAYER + "mlp.dense_h_to_4h.bias": torch.randn(4 * WIDTH),
        LAYER + "mlp.dense_4h_to_h.weight": torch.randn(WIDTH, 4 * WIDTH),
        LAYER + "mlp.dense_4h_to_h.bias": torch.randn(WIDTH),
        HEAD + "mixins.patch_embed.proj.weight": torch.full((WIDTH, 16, 2, 2), float("nan")),
        "conditioner.embedders.0.transformer.encoder.block.0.layer.1.DenseReluDense.wo.weight": torch.randn(
            4, 4
        ).bfloat16(),
    }


def part(values: dict[str, torch.Tensor], number: int, count: int) -> dict[str, torch.Tensor]:
    """Return the tensors of rank ``number``, split as SAT's ``ColumnParallelLinear.repartition`` and
    ``RowParallelLinear.repartition`` do."""

    def rows(value: torch.Tensor) -> torch.Tensor:
        size = value.shape[0] // count
        return value[size * number : size * (number + 1)]

    kept = {}
    for name, value in values.items():
        if "query_key_value" in name:
            third = value.shape[0] // 3
            kept[name] = torch.cat([rows(value[start : start + third]) for start in (0, third, 2 * third)])
        elif "dense_h_to_4h" in name:
            kept[name] = rows(value)
        elif name.endswith("weight") and ("attention.dense." in name or "dense_4h_to_h" in name):
            kept[name] = rows(value.T).T
        else:
            kept[name] = value.clone()
    return kept


@pytest.mark.parametrize("original", ["", "original."])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_joined_parts_equal_the_whole(count: int, original: str) -> None:
    whole = network(original)
    joined = join_parts([MemorySource(part(whole, number, count)) for number in range(count)])
    assert {name: info.shape for name, info in joined.tensors.items()} == {
        name: tuple(value.shape) for name, value in whole.items()
    }
    for name, value in whole.items():
        assert joined.tensors[name].dtype == joined.read(name).dtype
        torch.testing.assert_close(joined.read(name), value, rtol=0, atol=0, equal_nan=True)


def test_parts_joined_without_stride_or_in_another_order_differ() -> None:
    """This shows that the test above can fail."""
    whole = network()
    parts = [part(whole, number, 2) for number in range(2)]
    name = LAYER + "attention.query_key_value.weight"
    assert not torch.equal(torch.cat([parts[0][name], parts[1][name]]), whole[name])
    assert not torch.equal(join_parts([MemorySource(parts[1]), MemorySource(parts[0])]).read(name), whole[name])


def changed(
    name: str, change: Callable[[torch.Tensor], torch.Tensor | None], numbers: tuple[int, ...] = (1,)
) -> list[MemorySource]:
    parts = [part(network(), number, 2) for number in range(2)]
    for number in numbers:
        value = change(parts[number].pop(name, torch.zeros(0)))
        if value is not None:
            parts[number][name] = value
    return [MemorySource(values) for values in parts]


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        (changed(LAYER + "attention.dense.bias", lambda value: None), "attention.dense.bias: only in part 0"),
        (
            changed(LAYER + "input_layernorm.weight", lambda value: value[:6]),
            r"input_layernorm.weight: shapes \(12,\), \(6,\)",
        ),
        (
            changed(LAYER + "mlp.dense_h_to_4h.bias", lambda value: value.half()),
            "dense_h_to_4h.bias: dtypes torch.float32, torch.float16",
        ),
        (
            changed(LAYER + "attention.dense.matrix_A.0", lambda value: torch.ones(2, 6), (0, 1)),
            "matrix_A.0: it is unknown how SAT splits it",
        ),
        (
            changed(LAYER + "mlp.dense_h_to_4h_gate.weight", lambda value: torch.ones(2, 6), (0, 1)),
            "h_gate.weight: it is unknown how SAT splits it",
        ),
        (changed(LAYER + "attention.query_key_value.bias", lambda value: value[:-1], (0, 1)), "17 rows do not divide"),
        (
            changed(LAYER + "attention.query_key_value.weight", lambda value: value[:-6], (0, 1)),
            "attention.*do not fit",
        ),
        ([MemorySource(network()), MemorySource(network())], "attention.*do not fit"),
    ],
)
def test_parts_that_cannot_be_joined_are_named(parts: list[MemorySource], complaint: str) -> None:
    with pytest.raises(ConversionError, match=complaint) as error:
        join_parts(parts)
    assert error.value.exit_code == 2


def test_unsplit_tensors_that_differ_are_refused() -> None:
    name = HEAD + "mixins.patch_embed.proj.weight"
    joined = join_parts(changed(name, lambda value: torch.ones(WIDTH, 16, 2, 2)))
    with pytest.raises(ConversionError, match="proj.weight differs between the model-parallel parts 0 and 1"):
        joined.read(name)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    for number in (0, 2):
        (tmp_path / f"mp_rank_{number:02d}_model_states.pt").touch()
    with pytest.raises(CheckpointError, match="lacks mp_rank_01_model_states.pt"):
        part_files(tmp_path)
    (tmp_path / "mp_rank_01_model_states.pt").touch()
    (tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    assert [path.name[8:10] for path in part_files(tmp_path)] == ["00", "01", "02"]
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {"a": torch.ones(1)}, "mp_world_size": 4}, path)
    with pytest.raises(CheckpointError, match="one of 4 model-parallel parts; 3 are here"):
        check_part_count(TorchFile(path), 3)
