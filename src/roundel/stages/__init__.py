"""What `roundel.quantize` and its kin do: one file for each stage, from artifact to artifact.

    text -> curvature -> rounding -> tuning -> writing -> evaluation -> report

A stage takes what those before it have made as arguments, returns what it makes, and imports none that follow. The calls that run
several of them (`quantize.py`, `tune.py`) list them from top to bottom; `export.py` rounds nothing.
"""
