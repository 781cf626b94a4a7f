"""Test tensor operations: their results, their inverses, and the inputs they refuse."""

from __future__ import annotations

import pytest
import torch

from cogflow.errors import ConversionError
from cogflow.export.tensor_operations import (
    Alias,
    ChunkMap,
    Drop,
    Operation,
    Rename,
    Restore,
    TensorFormula,
    apply_operation,
    fill_names,
    inverse_table,
    regroup_rows,
    split_rows,
)

ADALN = regroup_rows("all", {"video": (0, 1, 2, 6, 7, 8), "text": (3, 4, 5, 9, 10, 11)})
CROSSED = ChunkMap(("a", "b"), ("x", "y"), (((1, 1), (0, 0)), ((0, 1), (1, 0))))


def rows(count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + count * 2.0).reshape(count, 2)


def test_split_returns_views_in_order() -> None:
    whole = rows(6)
    made = apply_operation(split_rows("qkv", "q", "k", "v"), {"qkv": whole})
    assert torch.equal(made["k"], whole[2:4])
    assert made["k"].data_ptr() == whole[2:4].data_ptr()


def test_regroup_concatenates_chunks_by_number() -> None:
    whole = torch.arange(24.0)
    made = apply_operation(ADALN, {"all": whole})
    assert made["video"].tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]
    assert made["text"].tolist() == [6, 7, 8, 9, 10, 11, 18, 19, 20, 21, 22, 23]


@pytest.mark.parametrize(
    ("operation", "tensors"),
    [
        (Rename("a", "b"), {"a": rows(1)}),
        (split_rows("a", "x", "y", "z"), {"a": rows(6)}),
        (ADALN, {"all": rows(24)}),
        (CROSSED, {"a": rows(4), "b": rows(4, start=50)}),
        (Alias(("a", "b"), "c"), {"a": rows(3), "b": rows(3)}),
    ],
)
def test_the_inverse_restores_the_sources(operation: Operation, tensors: dict[str, torch.Tensor]) -> None:
    made = apply_operation(operation, tensors)
    shapes = [{name: tuple(tensor.shape) for name, tensor in either.items()} for either in (tensors, made)]
    assert operation.out_shapes(shapes[0]) == shapes[1]
    back = operation.inverse()
    assert back is not None and back.inverse() == operation
    again = apply_operation(back, made)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_merging_a_regroup_restores_the_order() -> None:
    merge = ADALN.inverse()
    assert merge.sources == ("video", "text") and merge.targets == ("all",)
    whole = torch.arange(12.0)
    assert torch.equal(merge.make("all", apply_operation(ADALN, {"all": whole})), whole)


@pytest.mark.parametrize("shape", [(7, 2), (), (0, 2)])
def test_rows_that_do_not_divide_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConversionError, match="equal parts"):
        split_rows("a", "x", "y").out_shapes({"a": shape})


def test_merging_tensors_of_other_shapes_is_refused() -> None:
    with pytest.raises(ConversionError, match="fit"):
        split_rows("a", "x", "y").inverse().out_shapes({"x": (2, 3), "y": (2, 4)})


def test_an_alias_with_different_values_is_refused() -> None:
    with pytest.raises(ConversionError, match="values differ"):
        Alias(("a", "b"), "c").make("c", {"a": rows(1), "b": rows(1, start=1)})


def test_a_dropped_table_is_compared_and_restored() -> None:
    recipe = TensorFormula((2,), lambda: torch.tensor([0.1, 0.2]), "two numbers")
    drop = Drop("table", "computed elsewhere", recipe)
    assert drop.difference(torch.tensor([0.1, 0.2]).bfloat16()) == 0
    assert drop.difference(torch.tensor([0.1, 0.7])) == pytest.approx(0.5)
    assert drop.difference(torch.zeros(3)) == float("inf")
    (restore,) = inverse_table([drop, Drop("junk", "of no use")])
    assert isinstance(restore, Restore) and restore.inverse() == drop
    assert restore.make("table", {}).tolist() == recipe.make().tolist()


def test_an_inexact_formula_is_not_compared() -> None:
    assert (
        Drop("unused", "never read", TensorFormula((2,), lambda: torch.zeros(2), exact=False)).difference(torch.ones(2))
        is None
    )


def test_fill_names_replaces_fields_in_all_names() -> None:
    rows = fill_names((split_rows("l.{layer}.qkv", "b.{layer}.q", "b.{layer}.k"), Drop("l.{layer}.x", "why")), layer=4)
    assert [(row.sources, row.targets) for row in rows] == [(("l.4.qkv",), ("b.4.q", "b.4.k")), (("l.4.x",), ())]


@pytest.mark.parametrize(
    ("operation", "kind"),
    [(split_rows("a", "x", "y"), "split"), (ADALN, "regroup"), (split_rows("a", "x", "y").inverse(), "merge")],
)
def test_a_chunk_map_names_its_operation(operation: ChunkMap, kind: str) -> None:
    assert operation.kind == kind
