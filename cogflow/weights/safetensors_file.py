"""Write safetensors files whose permissions follow the umask.

safetensors writes to a temporary file of mode 0600 and renames it, so that nobody but its owner could read the result.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` to the safetensors file ``path``. Raises what ``safetensors.torch.save_file`` raises."""
    with path.open("ab") as file:  # made by the system, with the permissions of any other new file
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)
