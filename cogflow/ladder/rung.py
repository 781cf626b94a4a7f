"""The rungs of the sharpness ladder.

=========  =====================================  =================================  =================================
rung       frames                                 compared with                      cause of a loss
=========  =====================================  =================================  =================================
source     training clips at their own size       nothing                            the data itself is soft
clip       clips as the loader returns them       source, clip by clip               the loader softens
roundtrip  clips encoded and decoded by the VAE   clip, clip by clip                 VAE weights, precision, scaling
                                                                                     or tiling
base       samples before the first step          roundtrip, as distributions        starting model or sampler
tuned      samples of a later step                base, prompt by prompt             training
exported   samples of the exported folder         tuned, prompt by prompt and frame  conversion or assembly
                                                  by frame
=========  =====================================  =================================  =================================
"""

from __future__ import annotations

from enum import IntEnum


class Rung(IntEnum):
    """A stage between source clips and exported pipeline at which the metrics are measured. The value is the rung's
    number in records.
    """

    SOURCE = 0
    CLIP = 1
    ROUNDTRIP = 2
    BASE = 3
    TUNED = 4
    EXPORTED = 5

    @property
    def title(self) -> str:
        """The name in records and tables: source, clip, roundtrip, base, tuned or exported."""
        return self.name.lower()
