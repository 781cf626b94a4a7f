"""Sample a pipeline folder with diffusers alone: python -I fresh_process.py REQUEST.json

The file is run by its path and imports nothing of cogflow, so that it loads the folder as a user does who has only
diffusers. The request is a JSON object with these keys:

* ``folder``, ``pipeline`` (class name), ``dtype``, ``device``, ``call`` (arguments of the pipeline);
* ``noise``: safetensors file with the initial noise by sample name;
* ``frames``: safetensors file to write, uint8 [T, H, W, 3] by sample name;
* ``samples``: list of {"name", "text", "seed", "image"}. ``seed`` seeds the noise between the steps; ``image`` is the
  path of the first frame for image to video, null for text to video.
"""

import json
import sys
from pathlib import Path

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
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
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
            with Image.open(sample["image"], formats=("PNG", "JPEG")) as picture:
                call["image"] = picture.convert("RGB")
        with torch.no_grad():
            output = pipe(prompt=sample["text"], latents=latents, generator=generator, output_type="pt", **call)
        video = output.frames[0]
        frames[sample["name"]] = (video.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
        name = sample["name"].encode("unicode_escape").decode("ascii")
        print(f"fresh process: {number}/{len(request['samples'])} {name}", flush=True)
    if any(name.split(".")[0] == "cogflow" for name in sys.modules):
        raise SystemExit("cogflow was imported, so this check does not show what diffusers does alone")
    save_file(frames, request["frames"])


if __name__ == "__main__":
    main(sys.argv[1])
