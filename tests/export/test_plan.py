"""A plan accounts for every tensor, or says of each one what is wrong, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogflow.errors import ConversionError
from cogflow.export.computed_tensors import Drop, TensorFormula
from cogflow.export.mapping_plan import ConvertedTensors, computed_table_differences, make_plan
from cogflow.export.tensor_operations import Operation, Rename, inverse_table, split_rows
from cogflow.weights.tensor_source import TensorInfo

TABLE: tuple[Operation, ...] = (
    split_rows("qkv", "q", "k", "v"),
    Rename("bias", "b"),
    Drop("table", "computed", TensorFormula((3,), lambda: torch.tensor([1 / 3, 1.0, 2.0]))),
)


class Given:
    """Tensors in memory, as a source."""

    def __init__(self, **values: torch.Tensor) -> None:
        self.values = values
        self.tensors = {
            name: TensorInfo(name, tuple(value.shape), value.dtype, Path("given")) for name, value in values.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self.values[name]


def whole(dtype: torch.dtype = torch.bfloat16) -> Given:
    return Given(
        qkv=torch.arange(12.0).reshape(6, 2).to(dtype),
        bias=torch.ones(2, dtype=dtype),
        table=torch.tensor([1 / 3, 1.0, 2.0]).to(dtype),
    )


def message(
    source: Given, expected: dict[str, tuple[int, ...]] | None = None, table: tuple[Operation, ...] = TABLE
) -> str:
    with pytest.raises(ConversionError) as caught:
        make_plan(table, source.tensors, expected)
    return caught.value.message


def test_there_and_back() -> None:
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


def test_targets_that_the_model_lacks_or_waits_for() -> None:
    said = message(whole(), {"q": (2, 2), "k": (2, 2), "b": (2,), "extra": (1,)})
    assert "v (from qkv): the model has no such tensor" in said
    assert "extra [1]: nothing produces it" in said


def test_two_outcomes_and_two_origins() -> None:
    said = message(whole(), table=(*TABLE, Rename("bias", "q")))
    assert "bias: 2 rules use it" in said
    said = message(Given(a=torch.ones(1), b=torch.ones(1)), {"x": (1,)}, (Rename("a", "x"), Rename("b", "x")))
    assert "x: produced 2 times" in said


def test_two_origins_without_expectation() -> None:
    assert "x: produced 2 times" in message(
        Given(a=torch.ones(1), b=torch.ones(1)), None, (Rename("a", "x"), Rename("b", "x"))
    )


def test_rows_that_cannot_be_cut_and_dtypes_that_differ() -> None:
    assert "3 equal parts" in message(Given(qkv=torch.ones(7, 2), bias=torch.ones(2)))
    source = Given(q=torch.ones(2), k=torch.ones(2), v=torch.ones(2).half(), b=torch.ones(2))
    assert "v float16" in message(source, table=inverse_table(TABLE))
