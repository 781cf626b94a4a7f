"""Position tables that SAT stores and diffusers computes, to the bit as SAT fills them.

Sources: the papers' formulas in SAT's order of operations and precisions (``dit_video_concat.py`` of CogVideo's tag v1.0): sin-cos in
float64 rounded to fp32 once, rotary in fp32 throughout. Tokens run over frames, then rows, then columns.
"""

from __future__ import annotations

import numpy as np
import torch

BASE = 10000.0


def sincos(
    frames: int, rows: int, columns: int, width: int, text_tokens: int, spatial: float, temporal: float
) -> torch.Tensor:
    """fp32 ``[1, text_tokens + frames * rows * columns, width]``: zeros for the text, then the patches.

    A quarter of the width is for time, three for space. Positions are divided by the interpolation factors ``spatial`` and ``temporal``.
    """
    time = _waves(np.arange(frames, dtype=np.float32) / temporal, width // 4)
    half = width // 4 * 3 // 2
    down = _waves(np.arange(rows, dtype=np.float32) / spatial, half)
    across = _waves(np.arange(columns, dtype=np.float32) / spatial, half)
    table = np.empty((frames, rows, columns, width))
    table[..., : width // 4] = time[:, None, None]
    table[..., width // 4 : width // 4 + half] = across[None, None]
    table[..., width // 4 + half :] = down[None, :, None]
    patches = torch.from_numpy(table.reshape(1, -1, width)).float()
    return torch.cat([torch.zeros(1, text_tokens, width), patches], dim=1)


def _waves(positions: np.ndarray, width: int) -> np.ndarray:
    """float64 ``[positions, width]``: sines, then cosines."""
    angles = positions[:, None] * (1.0 / BASE ** (np.arange(width // 2, dtype=np.float64) / (width / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def rotary(frames: int, rows: int, columns: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sines, cosines), each fp32 ``[frames * rows * columns, head_dim]``: a quarter for time, three eighths each for rows and columns."""
    parts = []
    for axis, (count, width) in enumerate(
        ((frames, head_dim // 4), (rows, head_dim // 8 * 3), (columns, head_dim // 8 * 3))
    ):
        rates = 1.0 / (BASE ** (torch.arange(0, width, 2).float() / width))
        angles = torch.outer(torch.arange(count, dtype=torch.float32), rates).repeat_interleave(2, dim=1)
        around = [1, 1, 1, angles.shape[1]]
        around[axis] = count
        parts.append(angles.view(around).expand(frames, rows, columns, -1))
    table = torch.cat(parts, dim=-1).reshape(frames * rows * columns, -1)
    return table.sin(), table.cos()
