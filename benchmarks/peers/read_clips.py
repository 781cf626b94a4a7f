"""Read clips with a peer's own dataset code: ``python THIS REQUEST.json``, run by the interpreter of the peer's
environment.

Each line on stdin asks for one pass. A pass ends where the peer would call the VAE: fp32 frames of the wanted size in
[-1, 1]. The answer is one line of JSON with "seconds" and "shapes". The script imports nothing of cogflow, and
replaces only the encoders.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Pass = Callable[[], list[list[int]]]


def main() -> None:
    # A script's own folder is first on the path; the files beside this one must not shadow a module of the peer.
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]
    asked = json.loads(Path(sys.argv[1]).read_text())
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries print to stdout
    one_pass = {"CogVideo": cogvideo, "finetrainers": finetrainers}[asked["peer"]](asked)
    for _ in sys.stdin:
        began = time.perf_counter()
        shapes = one_pass()
        print(json.dumps({"seconds": time.perf_counter() - began, "shapes": shapes}), file=answers, flush=True)


def cogvideo(asked: dict[str, Any]) -> Pass:
    """Return passes of ``T2VDatasetWithResize`` under its trainer's loader: one clip at a time, in this process."""
    sys.path.insert(0, asked["clone"])
    import torch
    from accelerate import PartialState

    PartialState(cpu=True)
    shapes: list[list[int]] = []

    def encode_video(frames: Any) -> Any:
        shapes.append(list(frames.shape))
        return torch.zeros(1, 16, 1, 1, 1)

    args = SimpleNamespace(data_root=Path(asked["folder"]), model_name="peer", train_resolution=asked["size"])
    trainer = SimpleNamespace(
        encode_video=encode_video,
        encode_text=lambda _: torch.zeros(1, 1, 1),
        args=args,
        accelerator=SimpleNamespace(process_index=0),
    )
    frames, height, width = asked["size"]
    dataset = importlib.import_module("finetune.datasets").T2VDatasetWithResize(
        data_root=asked["folder"],
        caption_column="prompts.txt",
        video_column="videos.txt",
        device=torch.device("cpu"),
        trainer=trainer,
        max_num_frames=frames,
        height=height,
        width=width,
    )

    def one_pass() -> list[list[int]]:
        shapes.clear()
        for _ in torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=0, collate_fn=list):
            pass
        shutil.rmtree(Path(asked["folder"]) / "cache")
        return list(shapes)

    return one_pass


def finetrainers(asked: dict[str, Any]) -> Pass:
    """Return passes of its dataset of clips and captions with its preprocessing for one bucket."""
    # The package's __init__ imports every trainer; only the data code is needed.
    package = types.ModuleType("finetrainers")
    package.__path__ = [str(Path(asked["clone"]) / "finetrainers")]
    sys.modules["finetrainers"] = package
    module = importlib.import_module("finetrainers.data.dataset")
    settings = {"video_resolution_buckets": [asked["size"]], "reshape_mode": "bicubic"}

    def one_pass() -> list[list[int]]:
        dataset = module.VideoFileCaptionFileListDataset(asked["folder"])
        wrapped = module.wrap_iterable_dataset_for_preprocessing(dataset, "video", settings)
        return [list(sample["video"].shape) for sample in wrapped]

    return one_pass


if __name__ == "__main__":
    main()
