"""Check the components of a pipeline, write them as one folder, verify it by sampling, and upload it."""
