"""Score quality and sharpness zero-shot with a CLIP model from disk, after Wang et al. 2023. Optional.

"Exploring CLIP for Assessing the Look and Feel of Images" (arXiv 2207.12396): the image is compared with a pair of
opposite sentences, and the score is the softmax between the two. The model is transformers' own (Apache-2.0; OpenAI's
weights are MIT), read from a folder, never fetched. It resizes each frame to some 224 pixels, which hides fine blur: it
judges the whole picture; the sharpness metrics judge detail. Nothing in the verdicts depends on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

PAIRS = {"clip_quality": ("Good photo.", "Bad photo."), "clip_sharpness": ("Sharp photo.", "Blurry photo.")}
FRAMES = 4  # of each clip, evenly spread


class ClipScores:
    """CLIP-IQA with the model in ``folder`` (``config.json``, safetensors, tokenizer, processor).

    Raises ``OSError`` if the folder holds no such model.
    """

    def __init__(self, folder: Path | str, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        files = {"local_files_only": True}
        self.model = CLIPModel.from_pretrained(folder, use_safetensors=True, **files).to(device).eval()
        self.processor = CLIPProcessor.from_pretrained(folder, **files)

    @torch.no_grad()
    def __call__(self, frames: torch.Tensor | np.ndarray) -> dict[str, float]:
        """Return scores in 0..1 by the names of :data:`PAIRS`, the mean over four frames.

        ``frames``: ``[T, H, W, 3]``, uint8 or float in 0..1.
        """
        clip: Any = torch.as_tensor(frames)
        if clip.dim() != 4 or clip.shape[-1] != 3 or not len(clip):
            raise ValueError(f"frames are [T, H, W, 3], not {list(clip.shape)}")
        clip = clip[np.unique(np.linspace(0, len(clip) - 1, min(len(clip), FRAMES)).round().astype(int))]
        if clip.is_floating_point():
            clip = (torch.nan_to_num(clip).clamp(0, 1) * 255).round().to(torch.uint8)
        sentences = [sentence for pair in PAIRS.values() for sentence in pair]
        inputs = self.processor(text=sentences, images=list(clip.cpu().numpy()), return_tensors="pt", padding=True)
        logits = self.model(**inputs.to(self.model.device)).logits_per_image.float()
        shares = logits.reshape(len(clip), len(PAIRS), 2).softmax(dim=-1)[..., 0].mean(dim=0)
        return dict(zip(PAIRS, shares.tolist(), strict=True))
