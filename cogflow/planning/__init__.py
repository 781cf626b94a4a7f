"""Forecast the memory, time and disk space of a training before anything is loaded."""
