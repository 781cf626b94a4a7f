"""Program that each rank runs (``python -m tests.training.streaming PIPELINE``): build a transformer under ZeRO-3 and
print the peak of this process's own memory.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch

from cogflow.config.compose import compose
from cogflow.records.training_records import TrainedWith
from cogflow.runtime import ranks
from cogflow.training.deepspeed_start import start_deepspeed
from cogflow.training.initial_weights import build


def own_memory() -> int:
    """Return the bytes of this process that no file backs; mapped weights belong to the page cache."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak(threading.Thread):
    """Measures the peak memory every two milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = own_memory()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.most = max(self.most, own_memory())


def main(pipeline: Path) -> None:
    ranks.setup()
    words = [
        "stage=train",
        "model=cogvideox-5b",
        f"model.path={pipeline}",
        "data=folder",
        f"data.path={pipeline}",
        "deepspeed=zero3",
    ]
    config = compose([*words, "model.dtype=bf16"])
    start_deepspeed()
    peak = Peak()
    peak.start()
    began = time.monotonic()
    transformer = build(config, pipeline, torch.bfloat16, torch.device("cpu"), TrainedWith())
    seconds = time.monotonic() - began
    peak.ended.set()
    peak.join()
    model = sum(2 * getattr(parameter, "ds_numel", parameter.numel()) for parameter in transformer.parameters())
    line = json.dumps({"rank": ranks.rank(), "model": model, "peak": peak.most - peak.before, "seconds": seconds})
    sys.stdout.write(line + "\n")  # at once: two ranks share the pipe
    sys.stdout.flush()
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
