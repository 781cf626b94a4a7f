"""Test image to video and patches over time: prepare, train, resume, sample and export with models of the tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel

from cogflow.data.latent_cache import LatentCache
from cogflow.models.transformer_inputs import OFS, TransformerInputs, read_transformer_settings
from cogflow.training.batch import heldout_batch, training_batch
from tests.faults.conftest import World, server_says
from tests.faults.server import Server
from tests.training.variants import pipeline

pytestmark = pytest.mark.slow
SHORT = ["stage.steps=3", "stage.save_every=0", "data.image_variants=3"]


class Variant(World):
    """Runs of one kind of model."""

    def __init__(self, root: Path, server: Server, kind: str) -> None:
        self.model = pipeline(root / "model", kind)
        self.more = [f"model.path={self.model}", "data.image_variants=3"]
        self.root, self.server = root, server
        words = [
            "stage=prepare",
            "debug=quick",
            f"run.root={root}",
            "run.name=prepared",
            "tracking.wandb=disabled",
            *self.more,
        ]
        server_says(server.run(*words), 0)

    def words(self, name: str, *more: str, stage: str = "train") -> list[str]:
        return super().words(name, *self.more, *more, stage=stage)


@pytest.fixture(scope="module")
def i2v(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return Variant(tmp_path_factory.mktemp("i2v"), server, "1.5-i2v")


def inputs_of(model: Path) -> TransformerInputs:
    vae = json.loads((model / "vae" / "config.json").read_text())
    return TransformerInputs.of(
        read_transformer_settings(model),
        vae["scaling_factor"],
        invert_scale_latents=vae["invert_scale_latents"],
    )


def test_an_image_to_video_run_resumes_to_the_bit_and_samples_from_first_frames(i2v: Variant) -> None:
    words = [
        "stage.steps=4",
        "stage.save_every=0",
        "stage.sample_every=4",
        "sampling.steps=2",
        "stage.evaluate_every=2",
    ]
    server_says(i2v.train("whole", *words), 0)
    done = i2v.train("stopped", *words, fault="usr1@backward#5")
    assert done.fired and done.codes == [75], done.text[-3000:]
    server_says(i2v.train("stopped", *words), 0, "after step 3")
    assert i2v.losses("stopped") == i2v.losses("whole") and i2v.states("stopped", 4) == i2v.states("whole", 4)
    folder = i2v.root / "whole/samples/step-000004"
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    assert samples and all((folder / sample["image"]).is_file() for sample in samples)
    cache = LatentCache(i2v.root / "whole/cache")
    from PIL import Image

    with Image.open(folder / samples[0]["image"]) as picture:
        assert picture.size == (96, 64)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(64, 96, 3)
    assert any(pixels.equal(cache.first_frame(place)) for place in cache.holdout)


def test_an_image_to_video_export_runs_in_diffusers_and_two_ranks_train_as_one(i2v: Variant, tmp_path: Path) -> None:
    server_says(i2v.train("one", *SHORT, "deepspeed=zero3"), 0)
    assert i2v.train("two", *SHORT, "stage.gradient_accumulation=1", "deepspeed=zero3", ranks=2).codes == [0, 0]
    for step, (loss, _) in i2v.losses("one").items():
        assert i2v.losses("two")[step][0] == pytest.approx(loss, rel=1e-5)
    words = [
        "stage=export",
        "debug=quick",
        f"run.root={i2v.root}",
        "run.name=one",
        f"stage.output={tmp_path / 'export'}",
        *i2v.more,
    ]
    server_says(i2v.server.run(*words), 0)
    transformer = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "export" / "transformer")
    pipe = CogVideoXImageToVideoPipeline.from_pretrained(i2v.model, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    cache = LatentCache(i2v.root / "one/cache")
    image = cache.first_frame(0).permute(2, 0, 1)[None].float() / 255
    frames = pipe(
        image=image, prompt="a red circle", num_frames=9, height=64, width=96, num_inference_steps=2, output_type="pt"
    ).frames
    assert tuple(frames.shape) == (1, 9, 3, 64, 96) and bool(frames.isfinite().all())


def test_the_first_frame_is_joined_to_the_latents(i2v: Variant) -> None:
    """The first latent frame holds the image's latents with one of the stored noises, unless it is dropped; all
    others are zero.
    """
    cache, given = LatentCache(i2v.root / "prepared/cache"), inputs_of(i2v.model)
    assert given == TransformerInputs(0.7, image_factor=1 / 0.7, patch_size_t=2, ofs=True)
    batch = training_batch(cache, range(4), (0, 1), 0, inputs=given, text_dropout=0.0, image_dropout=0.0)
    assert batch.image is not None and batch.latents.shape == batch.image.shape == (4, 4, 16, 8, 12)
    assert torch.equal(batch.latents[:, 0], batch.latents[:, 1]), (
        "three latent frames and a copy of the first make two whole patches"
    )
    assert batch.image[:, 0].abs().sum() > 0 and not batch.image[:, 1:].any()
    for clip in range(4):
        off = [(0.7 * batch.image[clip, 0] - cache.image(clip, variant)[0][:, 0]).abs().mean() for variant in range(3)]
        spread = [(0.5 * cache.image(clip, variant)[1][:, 0]).exp().mean() for variant in range(3)]
        assert any(one < 3 * width for one, width in zip(off, spread, strict=True)), (
            "a sample of the posterior of one of them"
        )
    dropped = training_batch(cache, range(4), (0, 1), 0, inputs=given, text_dropout=0.0, image_dropout=1.0)
    assert dropped.image is not None and not dropped.image.any() and torch.equal(dropped.latents, batch.latents)
    again = training_batch(cache, range(4), (0, 1), 0, inputs=given, text_dropout=0.0, image_dropout=0.0)
    assert again.image is not None and torch.equal(again.image, batch.image)
    held = heldout_batch(cache, [(0, 500)], inputs=given)
    assert held.image is not None and torch.allclose(held.image[0, 0], cache.image(0, 0)[0][:, 0] / 0.7)
    extra = given.extra(torch.device("cpu"), torch.float32)
    assert list(extra) == ["ofs"] and extra["ofs"].tolist() == [OFS]


def test_clips_prepared_for_the_other_kind_of_model_are_refused(
    i2v: Variant, server: Server, prepared: Path, tmp_path: Path
) -> None:
    words = [word for word in i2v.words("as-text", *SHORT) if not word.startswith("model.path=")]
    done = i2v.server.run(*words)
    assert done.code == 2 and "prepare again" in done.text, done.text[-2000:]
    world = World(tmp_path, server, prepared)
    done = world.train("as-image", *SHORT, f"model.path={i2v.model}")
    assert done.code == 2 and "without first frames" in done.text, done.text[-2000:]


def test_learned_positions_fit_one_size_only(server: Server, tmp_path: Path) -> None:
    model = pipeline(tmp_path / "model", "5b-i2v")
    words = [
        "stage=prepare",
        "debug=quick",
        f"run.root={tmp_path}",
        "run.name=other",
        f"model.path={model}",
        "data.height=48",
    ]
    done = server.run(*words)
    assert done.code == 2 and "learned positions of 9x64x96 only" in done.text, done.text[-2000:]
