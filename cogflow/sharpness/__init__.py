"""How sharp a clip is, measured on raw frames."""
