"""Test that image-to-video pipelines are verified from the first frames of the run's samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from assembling import TOKENS, Work
from diffusers import CogVideoXImageToVideoPipeline
from PIL import Image
from safetensors.torch import save_file

from cogflow.errors import QualityGateError
from cogflow.files.atomic_write import write_json
from cogflow.files.publish import publish_folder
from cogflow.models import loading
from cogflow.sampling.noise import noise_for, step_generator
from cogflow.stages import assemble
from cogflow.weights.tensor_source import weights_fingerprint
from tests.random_parts import new_transformer

TEXT = "a red circle moves left over a light background"


@pytest.fixture
def from_image(work: Work) -> Work:
    """Replace the run's export and samples by those of an image-to-video transformer, sampled by diffusers."""
    torch.manual_seed(1)
    transformer = new_transformer(in_channels=32, max_text_seq_length=TOKENS, use_learned_positional_embeddings=True)
    weights = weights_fingerprint(transformer.state_dict().items())
    report = json.loads((work.run / "export" / "export.json").read_text())
    report |= {
        "source": str(work.run / "checkpoints" / "step-000004"),
        "source_weights_sha256": weights,
        "weights_sha256": weights,
    }
    with publish_folder(work.run / "export", replace=True) as folder:
        transformer.save_pretrained(folder / "transformer")
        write_json(folder / "export.json", report)
    pipe = CogVideoXImageToVideoPipeline(
        loading.load_tokenizer(work.base),
        loading.load_text_encoder(work.base),
        loading.load_vae(work.base),
        transformer,
        loading.load_scheduler(work.base),
    )
    samples = work.run / "samples" / "step-000004"
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    picture.save(samples / "circle.png")
    video = pipe(
        image=picture,
        prompt=TEXT,
        latents=noise_for(0, "circle", (1, 2, 16, 4, 4)),
        generator=step_generator(0, "circle"),
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=6.0,
        use_dynamic_cfg=True,
        max_sequence_length=TOKENS,
        output_type="pt",
    ).frames[0]
    save_file(
        {"circle-seed0": (video * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()},
        samples / "frames.safetensors",
    )
    record = json.loads((samples / "samples.json").read_text())
    record["samples"][0]["image"] = "circle.png"
    write_json(samples / "samples.json", record | {"weights_sha256": weights})
    return work


@pytest.mark.slow
def test_the_first_frames_of_the_run_give_its_videos(from_image: Work) -> None:
    work = from_image
    assemble.run(work.config(verify=True))
    pipeline = work.run / "pipeline"
    verified = json.loads((pipeline / "assembly.json").read_text())["verify"]
    assert verified["status"] == "passed" and verified["samples"][0]["psnr"] >= 50
    assert json.loads((pipeline / "model_index.json").read_text())["_class_name"] == "CogVideoXImageToVideoPipeline"


@pytest.mark.slow
def test_image_latents_at_another_scale_are_rejected(from_image: Work) -> None:
    """``invert_scale_latents`` of 1.5 on a model trained without it changes the image's latents only."""
    work = from_image
    changed = {"set": {"vae": {"invert_scale_latents": True}}, "force": ["vae.invert_scale_latents"]}
    with pytest.raises(QualityGateError, match="circle-seed0: PSNR") as caught:
        assemble.run(work.config(verify=True, **changed))
    assert caught.value.exit_code == 3 and not (work.run / "pipeline").exists()


def test_samples_without_first_frames_are_not_compared(from_image: Work) -> None:
    work = from_image
    work.edit("run/samples/step-000004/samples.json", lambda record: record["samples"][0].pop("image"))
    assemble.run(work.config(verify=True))
    verified = json.loads((work.run / "pipeline" / "assembly.json").read_text())["verify"]
    assert verified["status"] == "skipped" and "names no image for some prompts" in verified["reason"]
    assert "not compared" in Path(work.run / "pipeline" / "README.md").read_text()
