"""cogflow: training to export for CogVideoX, with blur made visible where it enters."""

__version__ = "0.1.0"
