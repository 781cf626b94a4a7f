"""Test that a plan uses every tensor, and that all problems are listed in one message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogflow.errors import ConversionError
from cogflow.export.export_plan import ConvertedTensors, computed_table_differences, make_plan
from cogflow.export.tensor_operations import Drop, Operation, Rename, TensorFormula, inverse_table, split_rows
from cogflow.weights.tensor_source import TensorInfo

TABLE: tuple[Operation, ...] = (
    split_rows("qkv", "q", "k", "v"),
    Rename("bias", "b"),
    Drop("table", "computed", TensorFormula((3,), lambda: torch.tensor([1 / 3, 1.0, 2.0]))),
)


class MemorySource:
    """A source of tensors in memory."""

    def __init__(self, **values: torch.Tensor) -> None:
        self.values = values
        self.tensors = {
            name: TensorInfo(name, tuple(value.shape), value.dtype, Path("given")) for name, value in values.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self.values[name]


def whole(dtype: torch.dtype = torch.bfloat16) -> MemorySource:
    return MemorySource(
        qkv=torch.arange(12.0).reshape(6, 2).to(dtype),
        bias=torch.ones(2, dtype=dtype),
        table=torch.tensor([1 / 3, 1.0, 2.0]).to(dtype),
    )


def message(
    source: MemorySource, expected: dict[str, tuple[int, ...]] | None = None, table: tuple[Operation, ...] = TABLE
) -> str:
    with pytest.raises(ConversionError) as caught:
        make_plan(table, source.tensors, expected)
    return caught.value.message


def test_the_inverse_restores_every_tensor() -> None:
    source = whole()
    plan = make_plan(TABLE, source.tensors, {"q": (2, 2), "k": (2, 2), "v": (2, 2), "b": (2,)})
    assert plan.dropped == [("table", "computed")]
    assert computed_table_differences(plan, source) == {"table": 0.0}
    there = ConvertedTensors(plan, source)
    assert torch.equal(there.read("v"), source.values["qkv"][4:])
    back = ConvertedTensors(
        make_plan(inverse_table(TABLE), there.tensors, {name: info.shape for name, info in source.tensors.items()}),
        there,
    )
    for name, value in source.values.items():
        assert back.tensors[name].dtype == back.read(name).dtype == value.dtype
        assert torch.equal(back.read(name), value), name


def test_a_dropped_tensor_may_be_absent() -> None:
    source = whole()
    del source.tensors["table"]
    assert make_plan(TABLE, source.tensors).dropped == []


def test_every_problem_is_listed() -> None:
    source = whole()
    source.tensors["stranger"] = source.tensors["bias"]
    del source.tensors["qkv"]
    said = message(source, {"b": (5,)})
    assert "3 problems" in said
    assert "qkv: missing; q and k and v need it" in said
    assert "stranger [2]: no rule uses it" in said
    assert "b (from bias): [2], the model has [5]" in said


def test_unknown_and_missing_targets_are_listed() -> None:
    said = message(whole(), {"q": (2, 2), "k": (2, 2), "b": (2,), "extra": (1,)})
    assert "v (from qkv): the model has no such tensor" in said
    assert "extra [1]: nothing produces it" in said


def test_a_source_used_twice_and_a_target_made_twice_are_refused() -> None:
    said = message(whole(), table=(*TABLE, Rename("bias", "q")))
    assert "bias: 2 rules use it" in said
    said = message(MemorySource(a=torch.ones(1), b=torch.ones(1)), {"x": (1,)}, (Rename("a", "x"), Rename("b", "x")))
    assert "x: produced 2 times" in said


def test_a_target_made_twice_is_refused_without_expected_shapes() -> None:
    assert "x: produced 2 times" in message(
        MemorySource(a=torch.ones(1), b=torch.ones(1)), None, (Rename("a", "x"), Rename("b", "x"))
    )


def test_rows_that_do_not_divide_and_mixed_dtypes_are_refused() -> None:
    assert "3 equal parts" in message(MemorySource(qkv=torch.ones(7, 2), bias=torch.ones(2)))
    source = MemorySource(q=torch.ones(2), k=torch.ones(2), v=torch.ones(2).half(), b=torch.ones(2))
    assert "v float16" in message(source, table=inverse_table(TABLE))
