"""A small model with random weights in a base folder, and a run with an export and samples of it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

from cogflow.config.sampling_section import SamplingConfig
from cogflow.files.atomic_write import write_json
from cogflow.files.publish import publish_folder
from cogflow.models import loading
from cogflow.models.family import MODEL_SPECS
from cogflow.records.sample_records import SampledWeights
from cogflow.sampling.prompts import Prompt
from cogflow.sampling.sample_folder import write_samples
from cogflow.sampling.sampler import Sampler, requests
from cogflow.weights.tensor_source import weights_fingerprint
from tests.random_parts import new_text_encoder, new_transformer, new_vae
from tools.tiny_text import make_tokenizer

# Tests are imported by path; this makes the helper module assembling.py importable.
sys.path.insert(0, str(Path(__file__).parent))

from assembling import TOKENS, TRAINED_WITH, Work


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base/`` (a pipeline folder's components) and ``run/`` (export and samples), made once; tests work on copies."""
    root = tmp_path_factory.mktemp("made")
    base = root / "base"
    torch.manual_seed(0)
    tokenizer = make_tokenizer(base / "tokenizer")
    new_text_encoder(len(tokenizer)).save_pretrained(base / "text_encoder")
    new_vae(scaling_factor=0.7).save_pretrained(base / "vae")
    CogVideoXDDIMScheduler(**MODEL_SPECS["tiny"].scheduler_config()).save_pretrained(base / "scheduler")
    transformer = new_transformer(max_text_seq_length=TOKENS)
    transformer.save_pretrained(base / "transformer")
    shutil.rmtree(base / "tokenizer" / ".cache", ignore_errors=True)
    _run(root / "run", base, transformer)
    return root


def _run(run: Path, base: Path, transformer: CogVideoXTransformer3DModel) -> None:
    weights = weights_fingerprint(transformer.state_dict().items())
    with publish_folder(run / "export") as folder:
        transformer.save_pretrained(folder / "transformer")
        report = {
            "source": str(run / "checkpoints" / "step-000004"),
            "step": 4,
            "weights": "model",
            "family": "small",
            "dtype": "fp32",
        }
        write_json(
            folder / "export.json",
            report | {"trained_with": TRAINED_WITH, "source_weights_sha256": weights, "weights_sha256": weights},
        )
    tokenizer, encoder = loading.load_tokenizer(base), loading.load_text_encoder(base)
    prompts = [Prompt("circle", "a red circle moves left over a light background")]
    embeds = loading.encode_prompts(tokenizer, encoder, [prompt.text for prompt in prompts] + [""], TOKENS)
    sampler = Sampler(
        transformer,
        loading.load_vae(base),
        loading.load_scheduler(base),
        embeds[-1],
        SamplingConfig(steps=3),
        frames=5,
        height=32,
        width=32,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    write_samples(
        run / "samples" / "step-000004",
        sampler,
        requests(prompts, embeds, [0]),
        fps=8.0,
        weights=SampledWeights(weights, 4, "model"),
        title="samples",
    )


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name in ("base", "run"):
        shutil.copytree(made / name, tmp_path / name)
    return Work(tmp_path)
