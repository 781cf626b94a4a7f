"""Test the fixed noise and the prompts to sample."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogflow.errors import DataError
from cogflow.sampling.noise import noise_for
from cogflow.sampling.prompts import SHAPES_PROMPTS, prompts_for, read_prompts

SHAPE = (1, 3, 16, 8, 12)


def test_noise_depends_only_on_seed_and_prompt() -> None:
    first = noise_for(0, "a", SHAPE)
    torch.manual_seed(123)
    torch.randn(5)
    assert torch.equal(first, noise_for(0, "a", SHAPE))
    assert not torch.equal(first, noise_for(1, "a", SHAPE)) and not torch.equal(first, noise_for(0, "b", SHAPE))
    assert abs(float(first.mean())) < 0.05 and abs(float(first.std()) - 1) < 0.05


def test_noise_does_not_change_the_global_random_state() -> None:
    before = torch.get_rng_state()
    noise_for(0, "a", SHAPE)
    assert torch.equal(before, torch.get_rng_state())


def test_noise_is_the_same_on_every_machine() -> None:
    # If this changes, samples of older runs can no longer be compared.
    assert torch.allclose(noise_for(7, "purple-star", (3,)), torch.tensor(EXPECTED), atol=1e-6)


EXPECTED = [0.043409, 0.720557, 0.524281]


def test_prompts_of_a_text_file_are_named_by_line_number(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n  two  \n")
    assert [(p.id, p.text) for p in read_prompts(tmp_path / "p.txt")] == [("prompt-001", "one"), ("prompt-003", "two")]


def test_all_bad_lines_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "text": "x"}\nnonsense\n{"id": "../b", "text": "y"}\n{"id": "a", "text": "z"}\n')
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert all(part in str(caught.value) for part in ("line 2", "line 3: id '../b'", "line 4: id a is there twice"))


@pytest.mark.parametrize(("name", "text"), [("empty.txt", ""), ("p.csv", "a\n")])
def test_files_without_prompts_or_of_another_type_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError):
        read_prompts(tmp_path / name)


def test_without_a_file_the_prompts_come_from_the_data() -> None:
    assert prompts_for(None, "shapes", []) == list(SHAPES_PROMPTS)
    assert [p.text for p in prompts_for(None, "folder", ["a", "a", "b", "c", "d", "e"])] == ["a", "b", "c", "d"]
