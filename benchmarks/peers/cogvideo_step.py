"""Time the training step of a CogVideo clone: ``python THIS REQUEST.json ANSWER.json``, run by the interpreter of the
clone's environment.

The trainer is made without its ``__init__``, which would download weights and read videos. Loss, optimizer, preparation
and DeepSpeed settings (``finetune/configs/zero2.yaml``) are the clone's, and a step does the same as in its loop. The
script imports nothing of cogflow.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast


def main() -> None:
    # A script's own folder is first on the path; the files beside this one must not shadow a module of the clone.
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]
    asked = json.loads(Path(sys.argv[1]).read_text())
    sys.path.insert(0, asked["clone"])
    if not asked["gpu"]:
        os.environ["DS_ACCELERATOR"] = "cpu"
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": asked["port"],
    }.items():
        os.environ.setdefault(name, value)
    import torch

    trainer = _trainer(asked)
    batches = [batch for _ in range(math.ceil(asked["steps"])) for batch in trainer.data_loader]
    turns = []
    for turn in range(1 + asked["repeats"]):
        began = time.perf_counter()
        for step in range(asked["steps"]):
            _step(trainer, batches[step % len(batches)])
        if asked["gpu"]:
            torch.cuda.synchronize()
        if turn:
            turns.append((time.perf_counter() - began) / asked["steps"])
    peak = (
        torch.cuda.max_memory_allocated() if asked["gpu"] else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    Path(sys.argv[2]).write_text(json.dumps({"turns": turns, "peak": peak}))


def _trainer(asked: dict[str, Any]) -> Any:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin
    from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel

    own = importlib.import_module("finetune.models.cogvideox_t2v.sft_trainer").CogVideoXT2VSftTrainer
    dtype = getattr(torch, asked["dtype"])
    device = torch.device("cuda" if asked["gpu"] else "cpu")
    with device:
        transformer = CogVideoXTransformer3DModel.from_config(asked["config"]).to(dtype)
    if asked["recompute"]:
        transformer.enable_gradient_checkpointing()
    settings = json.loads((Path(asked["clone"]) / "finetune" / "configs" / "zero2.yaml").read_text())
    settings["bf16"]["enabled"] = dtype == torch.bfloat16
    settings["train_micro_batch_size_per_gpu"] = asked["batch_size"]
    if not asked["gpu"]:
        settings["zero_optimization"]["overlap_comm"] = False
    trainer = own.__new__(own)
    trainer.accelerator = Accelerator(
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
    )
    trainer.args = SimpleNamespace(
        learning_rate=1e-6,
        optimizer="adamw",
        beta1=0.9,
        beta2=0.95,
        beta3=0.98,
        epsilon=1e-8,
        weight_decay=1e-4,
        train_steps=10**6,
        train_epochs=1,
        gradient_accumulation_steps=1,
        lr_warmup_steps=0,
        lr_scheduler="constant",
        lr_num_cycles=1,
        lr_power=1.0,
        max_grad_norm=1.0,
    )
    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", snr_shift_scale=1.0, rescale_betas_zero_snr=True)
    # Some of these stay on the CPU in the clone's own trainer, too.
    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(128, 256, 256, 512)))
    trainer.components = SimpleNamespace(transformer=transformer, scheduler=scheduler, vae=vae)
    trainer.state = SimpleNamespace(
        transformer_config=transformer.config, weight_dtype=dtype, overwrote_max_train_steps=False
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    text = (asked["config"]["max_text_seq_length"], asked["config"]["text_embed_dim"])
    samples = [
        {
            "encoded_video": torch.randn(16, *asked["latents"], dtype=dtype),
            "prompt_embedding": torch.randn(*text, dtype=dtype),
        }
        for _ in range(4 * asked["batch_size"])
    ]
    trainer.data_loader = torch.utils.data.DataLoader(
        cast(Any, samples), batch_size=asked["batch_size"], collate_fn=trainer.collate_fn, pin_memory=asked["gpu"]
    )
    trainer.prepare_optimizer()
    trainer.prepare_for_training()
    trainer.components.transformer.train()
    return trainer


def _step(trainer: Any, batch: Any) -> None:
    accelerator = trainer.accelerator
    with accelerator.accumulate([trainer.components.transformer]):
        loss = trainer.compute_loss(batch)
        accelerator.backward(loss)
        norm = trainer.components.transformer.get_global_grad_norm()
        if hasattr(norm, "item"):
            norm.item()
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.optimizer.zero_grad()
    loss.detach().item()


if __name__ == "__main__":
    main()
