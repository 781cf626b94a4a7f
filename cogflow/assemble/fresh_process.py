"""Sample a pipeline folder with diffusers alone, in a process of its own: python -I fresh_process.py REQUEST.json

This file is run by its path and imports nothing of cogflow: it sees the folder as somebody sees it who has only diffusers.
The request: {"folder", "pipeline", "dtype", "device", "noise", "frames", "call": {...}, "samples": [{"name", "text", "seed", "image"}]}.
``noise`` names a safetensors file with the initial noise of each sample, ``frames`` the one to write: uint8 [T, H, W, 3] by name; ``seed``
is of what is drawn besides; ``image`` is a picture's path for image to video, null for text to video.
"""

import json
import sys

import diffusers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PIPELINES = {
    "CogVideoXPipeline": diffusers.CogVideoXPipeline,
    "CogVideoXImageToVideoPipeline": diffusers.CogVideoXImageToVideoPipeline,
}


def main(request_path: str) -> None:
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    dtype = DTYPES[request["dtype"]]
    diffusers.utils.logging.disable_progress_bar()
    cls = PIPELINES[request["pipeline"]]
    pipe = cls.from_pretrained(request["folder"], torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(request["device"])
    noise = load_file(request["noise"])
    frames = {}
    for number, sample in enumerate(request["samples"], start=1):
        latents = noise[sample["name"]].to(request["device"], dtype)
        generator = torch.Generator().manual_seed(sample["seed"])
        call = dict(request["call"])
        if sample.get("image"):
            with Image.open(sample["image"]) as picture:
                call["image"] = picture.convert("RGB")
        with torch.no_grad():
            video = pipe(prompt=sample["text"], latents=latents, generator=generator, output_type="pt", **call).frames[
                0
            ]
        frames[sample["name"]] = (video.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
        print(f"fresh process: {number}/{len(request['samples'])} {sample['name']}", flush=True)
    if any(name.split(".")[0] == "cogflow" for name in sys.modules):
        raise SystemExit("cogflow was imported: this check would prove nothing")
    save_file(frames, request["frames"])


if __name__ == "__main__":
    main(sys.argv[1])
