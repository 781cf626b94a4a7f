"""Checkpoints of SAT and DeepSpeed: which files are opened, which weights are chosen, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogflow.artifacts.identify import identify
from cogflow.errors import CheckpointError, ConfigError, ConversionError
from cogflow.export.origin import open_foreign
from cogflow.weights.foreign import ForeignWeights

HEAD = "model.diffusion_model."


def find(place: Path, weights: str = "auto", masters: str = "auto") -> ForeignWeights:
    return open_foreign(identify(place), weights, masters)


def sat_file(path: Path, value: float = 1.0, dtype: torch.dtype = torch.bfloat16, **beside: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    module = {
        HEAD + "mixins.patch_embed.proj.weight": torch.full((4, 16, 2, 2), value, dtype=dtype),
        HEAD + "transformer.layers.0.attention.dense.weight": torch.full(
            (4, 4 // beside.get("mp_world_size", 1)), value, dtype=dtype
        ),
        "first_stage_model.encoder.conv_in.conv.weight": torch.ones(2, dtype=dtype),
    }
    torch.save({"module": module, **beside}, path)
    return path


@pytest.fixture
def sat(tmp_path: Path) -> Path:
    """A folder as SAT writes it, with the average beside the model."""
    folder = tmp_path / "run-11-23-03-00"
    sat_file(folder / "500/mp_rank_00_model_states.pt", 1.0, iteration=500, global_steps=0, mp_world_size=1)
    sat_file(folder / "500-ema/mp_rank_00_model_states.pt", 2.0, iteration=500)
    (folder / "latest").write_text("500\n", encoding="utf-8")
    (folder / "training_config.yaml").write_text("model: {}\n", encoding="utf-8")
    (folder / "model_config.json").write_text(json.dumps({"num_layers": 1}), encoding="utf-8")
    (folder / "configs").mkdir()
    for name in ("sft.yaml", "cogvideox_5b.yaml", "notes.txt"):
        (folder / "configs" / name).touch()
    return folder


def value(found: ForeignWeights) -> float:
    return found.tensors.read(HEAD + "mixins.patch_embed.proj.weight")[0, 0, 0, 0].item()


@pytest.mark.parametrize(
    ("given", "weights", "expected", "chosen", "note"),
    [
        ("", "auto", 1.0, "model", "their average is beside them, in 500-ema"),
        ("", "model", 1.0, "model", ""),
        ("", "ema", 2.0, "ema", ""),
        ("500", "auto", 1.0, "model", "in 500-ema"),
        ("500", "ema", 2.0, "ema", ""),
        ("500-ema", "auto", 2.0, "ema", ""),
        ("500-ema", "model", 1.0, "model", ""),
        ("500/mp_rank_00_model_states.pt", "auto", 1.0, "model", "under module"),
        ("500-ema/mp_rank_00_model_states.pt", "ema", 2.0, "ema", "under module"),
        ("500-ema/mp_rank_00_model_states.pt", "auto", 2.0, "ema", "under module"),
    ],
)
def test_a_sat_folder_is_opened_as_model_or_average(
    sat: Path, given: str, weights: str, expected: float, chosen: str, note: str
) -> None:
    found = find(sat / given, weights)
    assert (found.layout, found.weights, found.step, value(found)) == ("sat", chosen, 500, expected)
    assert [path.relative_to(sat).as_posix() for path in found.yamls] == [
        "training_config.yaml",
        "model_config.json",
        "configs/cogvideox_5b.yaml",
        "configs/sft.yaml",
    ]
    assert [path.parent.name for path in found.files] == ["500-ema" if chosen == "ema" else "500"]
    assert note in "".join(found.notes) and bool(note) == bool(found.notes)
    assert found.metadata["wrapper"] == "module" and found.metadata["iteration"] == 500


@pytest.mark.parametrize("name", ["2b", "5b-i2v", "1.5-5b-i2v", "5b-lora"])
def test_files_that_sat_itself_wrote_are_opened(name: str) -> None:
    """The real files, with numpy's random state in them."""
    found = find(Path(__file__).parent.parent / "golden" / "sat" / name)
    assert (found.layout, found.step, found.weights, found.metadata["ds_version"]) == ("sat", 500, "model", "0.19.8")
    assert [path.name for path in found.yamls[:2]] == ["training_config.yaml", "model_config.json"]
    assert "sft.yaml" in {path.name for path in found.yamls}
    assert any(name.endswith("layers.1.mlp.dense_4h_to_h.weight") for name in found.tensors.tensors)


def test_the_transformer_of_a_published_sat_folder_is_taken(sat: Path, tmp_path: Path) -> None:
    """CogVideoX-2b-sat: transformer/1000/..., vae/3d-vae.pt."""
    shutil.move(sat, tmp_path / "sat/transformer")
    found = find(tmp_path / "sat")
    assert found.layout == "sat" and found.step == 500 and "its transformer is taken" in found.notes[0]


def test_the_only_step_is_taken_without_latest(sat: Path) -> None:
    (sat / "latest").unlink()
    found = find(sat)
    assert found.step == 500 and "500 is the only step" in found.notes[0]
    sat_file(sat / "1000/mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"no file latest, and several steps: 1000, 500"):
        find(sat)


@pytest.mark.parametrize("wrapper", ["module", "model", "state_dict", None])
@pytest.mark.parametrize("head", [HEAD, ""])
def test_single_files_are_unwrapped(tmp_path: Path, wrapper: str | None, head: str) -> None:
    weights = {head + "mixins.patch_embed.proj.weight": torch.ones(4, 16, 2, 2)}
    torch.save({wrapper: weights} if wrapper else weights, tmp_path / "some.bin")
    for place in (tmp_path / "some.bin", tmp_path):
        found = find(place)
        assert (found.layout, found.step, found.files, found.metadata["wrapper"]) == (
            "sat",
            None,
            [tmp_path / "some.bin"],
            wrapper or "none",
        )


def test_a_3d_vae_file_is_opened_as_sats_vae(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cogvideox_5b.yaml").touch()
    names = (
        "encoder.conv_in.conv.weight",
        "encoder.down.0.block.0.norm1.weight",
        "decoder.up.0.block.0.norm1.norm_layer.weight",
    )
    torch.save({"state_dict": {name: torch.ones(1) for name in names}}, tmp_path / "vae" / "3d-vae.pt")
    for place in (tmp_path / "vae", tmp_path / "vae" / "3d-vae.pt"):
        found = find(place)
        assert found.layout == "vae" and set(found.tensors.tensors) == set(names)
        assert [path.name for path in found.yamls] == ["cogvideox_5b.yaml"]


def test_a_deepspeed_checkpoint_of_diffusers_names_is_opened(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "global_step7"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "latest").write_text("global_step7", encoding="utf-8")
    torch.save(
        {"module": {"transformer_blocks.0.ff.weight": torch.ones(2)}, "global_steps": 7},
        folder / "mp_rank_00_model_states.pt",
    )
    found = find(tmp_path / "run")
    assert (found.layout, found.step, found.origin) == ("zero", 7, folder)


def test_model_parallel_parts_are_joined(tmp_path: Path) -> None:
    folder = tmp_path / "500"
    for number in range(2):
        sat_file(folder / f"mp_rank_{number:02d}_model_states.pt", mp_world_size=2, iteration=500)
    found = find(folder)
    assert len(found.files) == 2 and "2 model-parallel parts are joined" in "".join(found.notes)
    assert found.tensors.tensors[HEAD + "transformer.layers.0.attention.dense.weight"].shape == (4, 4)
    with pytest.raises(CheckpointError, match="one of 2 model-parallel parts; 1 is here"):
        find(folder / "mp_rank_00_model_states.pt")
    sat_file(folder / "mp_rank_01_model_states.pt", 3.0, mp_world_size=2)
    with pytest.raises(ConversionError, match=r"patch_embed.proj.weight differs between"):
        value(find(folder))
    (folder / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"lacks mp_rank_00"):
        find(folder)
    (folder / "mp_rank_01_model_states.pt").rename(folder / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="one of 2 model-parallel parts; 1 is here"):
        find(folder)


def broken_latest(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "latest").write_text(text, encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "given", "options", "complaint"),
    [
        (broken_latest(""), "", {}, "latest names no folder beside it: ''"),
        (broken_latest("../500"), "", {}, "latest names no folder beside it"),
        (broken_latest(".."), "", {}, "latest names no folder beside it"),
        (broken_latest("1000"), "", {}, "(?s)latest names 1000.*does not exist.*500, 500-ema"),
        (
            lambda f: (f / "500/mp_rank_00_model_states.pt").unlink(),
            "",
            {},
            "500 holds no mp_rank_00_model_states.pt. It holds nothing",
        ),
        (lambda f: shutil.rmtree(f / "500-ema"), "", {"weights": "ema"}, "weights=model; 500-ema is not beside it"),
        (lambda f: shutil.rmtree(f / "500"), "500-ema", {"weights": "model"}, "weights=ema; 500 is not beside it"),
        (None, "500/mp_rank_00_model_states.pt", {"weights": "ema"}, "is of weights=model"),
        (None, "500", {"masters": "fp32"}, "holds no fp32 master weights: .* is in bfloat16"),
        (None, "500/mp_rank_00_model_states.pt", {"masters": "fp32"}, "holds no fp32 master weights"),
    ],
)
def test_broken_folders_and_wrong_options_are_refused(
    sat: Path, change: Callable[[Path], None] | None, given: str, options: dict[str, str], complaint: str
) -> None:
    if change:
        change(sat)
    with pytest.raises(CheckpointError, match=complaint) as error:
        find(sat / given, **options)
    assert error.value.hint


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["transformer_blocks.0.attn1.to_q.weight"], "(?s)of diffusers, not of SAT.*transformer_blocks.0.attn1"),
        (["encoder.down_blocks.0.resnets.0.norm1.weight"], "of diffusers, not of SAT"),
        (
            ["blocks.0.weight", "head.weight"],
            r"(?s)no layout that cogflow knows.*blocks.0.weight \(1,\)\n.*head.weight \(1,\)",
        ),
    ],
)
def test_unknown_tensor_names_are_shown(tmp_path: Path, names: list[str], complaint: str) -> None:
    torch.save({name: torch.ones(1) for name in names}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=complaint):
        find(tmp_path / "x.pt")


def test_fp32_files_count_as_masters(tmp_path: Path) -> None:
    path = sat_file(tmp_path / "500/mp_rank_00_model_states.pt", dtype=torch.float32)
    assert find(path, masters="fp32").layout == find(path.parent, masters="fp32").layout == "sat"


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    path = sat_file(tmp_path / "500/mp_rank_00_model_states.pt")
    with pytest.raises(ConfigError, match="weights=best"):
        find(path, "best")
    with pytest.raises(ConfigError, match="masters=fp8"):
        find(path, masters="fp8")
