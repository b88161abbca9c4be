"""After rounding: codes, scales, vectors and norms moved downhill in the KL, all at once or one decoder layer at a time."""

from roundel.tuning.blocks import tune_blocks
from roundel.tuning.end_to_end import tune_end_to_end
from roundel.tuning.job import Job, Tuned

__all__ = ["Job", "Tuned", "tune_blocks", "tune_end_to_end"]
