"""The rungs of the sharpness ladder, gathered from clips, VAE, samples and the exported pipeline into ``<run>/ladder.json``."""
