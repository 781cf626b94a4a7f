"""Test scores by a CLIP model, with a small random one."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch

from cogflow.data.shapes import draw, scenes
from cogflow.data.video import write_video
from cogflow.sampling.clip_files import ClipSource
from cogflow.sharpness.clip_iqa import PAIRS, ClipScores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    place = tmp_path_factory.mktemp("clip")
    pieces = ["<|startoftext|>", "<|endoftext|>"] + [
        letter + end for letter in string.ascii_lowercase + "." for end in ("", "</w>")
    ]
    (place / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(vocab=str(place / "vocab.json"), merges=str(place / "merges.txt"))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(pieces), "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8})).save_pretrained(
        place
    )
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(place)
    return place


def test_scores_equal_the_models_softmax(folder: Path) -> None:
    scores, clip = ClipScores(folder), draw(scenes(1, 0)[0], 9, 64, 96)
    found = scores(clip)
    assert set(found) == set(PAIRS) and all(0 < value < 1 for value in found.values())
    # The same number from the embeddings, one frame after another.
    expected = []
    for frame in clip[[0, 3, 5, 8]]:
        inputs = scores.processor(text=list(PAIRS["clip_sharpness"]), images=[frame], return_tensors="pt", padding=True)
        with torch.no_grad():
            output = scores.model(**inputs)
        near = scores.model.logit_scale.exp() * output.image_embeds @ output.text_embeds.T
        expected.append(float(near.softmax(dim=-1)[0, 0]))
    assert found["clip_sharpness"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_scores_do_not_depend_on_dtype(folder: Path) -> None:
    scores, clip = ClipScores(folder), draw(scenes(1, 1)[0], 5, 64, 96)
    assert scores(torch.from_numpy(clip).float() / 255) == pytest.approx(scores(clip), abs=1e-6)


def test_stage_sample_scores_each_clip(folder: Path, tmp_path: Path) -> None:
    from cogflow.config.compose import compose
    from cogflow.stages.sample import clip_scores

    write_video(tmp_path / "clip.mp4", draw(scenes(1, 0)[0], 5, 64, 96), 8)
    clips = ClipSource(tmp_path)
    found = clip_scores(compose(["stage=sample", f"sampling.clip_model={folder}"]), clips)
    assert set(found["clip"]) == set(PAIRS)
    assert clip_scores(compose(["stage=sample"]), clips) == {}


def test_a_folder_without_a_model_raises_and_nothing_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="model.safetensors"):
        ClipScores(tmp_path)
