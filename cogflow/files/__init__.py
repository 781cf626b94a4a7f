"""Writing to disk so that a reader never meets half an artefact: atomic publishing, manifests with hashes, contained paths."""
