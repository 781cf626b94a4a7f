"""Artifacts: the files and folders that cogflow writes and reads, what they are, and where they are in a run."""
