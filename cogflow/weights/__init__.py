"""Weights on disk: read one tensor at a time, written in shards, fingerprinted."""
