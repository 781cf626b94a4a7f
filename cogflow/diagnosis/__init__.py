"""Find which component, config field or tensor degrades the samples of a pipeline, and repair it."""
