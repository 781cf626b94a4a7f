"""Write and read weights in diffusers' layout, one by one: no rank holds more than one file in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from cogflow.files.atomic_write import storage_errors, write_json
from cogflow.runtime import ranks
from cogflow.training.engine import Engine
from cogflow.weights.safetensors_file import save_tensors

STEM = "diffusion_pytorch_model"
FILE_BYTES = 4 * 1024**3
"""Size at which a file is written and the next one begun."""


def save_weights(folder: Path, engine: Engine, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write ``weights`` and the model's config below ``folder``.

    Every rank takes all weights; rank 0 holds one file of them at a time.
    """
    writer = _Writer(folder)
    if ranks.is_main():
        engine.module.save_config(folder)
    for name, weight in weights:
        if ranks.is_main():
            writer.add(name, weight)
    if ranks.is_main():
        writer.finish()


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) from the safetensors files of ``folder``, one at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                yield name, opened.get_tensor(name)


class _Writer:
    """Collects tensors and writes a file whenever FILE_BYTES are reached."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[tuple[Path, list[str]]] = []
        self._tensors: dict[str, torch.Tensor] = {}
        self._size = 0
        self._total = 0

    def add(self, name: str, weight: torch.Tensor) -> None:
        tensor = weight.to("cpu", copy=True).contiguous()
        self._tensors[name] = tensor
        self._size += tensor.nbytes
        self._total += tensor.nbytes
        if self._size >= FILE_BYTES:
            self._write()

    def finish(self) -> None:
        """Write the last file, give all files the names that diffusers expects, and index several files."""
        if self._tensors:
            self._write()
        if len(self._files) == 1:
            self._files[0][0].rename(self.folder / f"{STEM}.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, (file, names) in enumerate(self._files, start=1):
            final = f"{STEM}-{index:05d}-of-{len(self._files):05d}.safetensors"
            file.rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        content = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        write_json(self.folder / f"{STEM}.safetensors.index.json", content)

    def _write(self) -> None:
        file = self.folder / f"part-{len(self._files):05d}.safetensors"
        with storage_errors(self.folder):
            save_tensors(self._tensors, file, metadata={"format": "pt"})
        self._files.append((file, list(self._tensors)))
        self._tensors = {}
        self._size = 0
