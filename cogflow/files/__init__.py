"""Files and folders on disk: atomic writing and publishing, manifests with hashes, typed records, contained paths."""
