"""Run the converter of a CogVideo clone on a transformer: ``python THIS CLONE CHECKPOINT OUTPUT LAYERS HEADS ROTARY``.

The converter's ``main`` also downloads a T5 and a tokenizer. This script calls only its two steps for the transformer,
with the converter's arguments.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    clone, checkpoint, output, layers, heads, rotary = sys.argv[1:]
    path = Path(clone) / "tools" / "convert_weight_sat2hf.py"
    spec = importlib.util.spec_from_file_location("convert_weight_sat2hf", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    import torch

    half = torch.bfloat16 if rotary == "True" else torch.float16
    model = tool.convert_transformer(
        checkpoint, int(layers), int(heads), rotary == "True", False, half, tool.get_transformer_init_kwargs("1.0")
    )
    model.to(half).save_pretrained(output, safe_serialization=True, max_shard_size="5GB")


if __name__ == "__main__":
    main()
