"""Clips and captions: drawing, reading, caching and ordering them."""
