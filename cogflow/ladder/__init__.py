"""The sharpness ladder: one measurement per stage from source clips to the exported pipeline, each compared with the
one before.
"""
