"""Roundel shrinks a language model to 2-8 bits per weight while keeping its output distribution."""

import importlib.metadata

from roundel.errors import RoundelError
from roundel.hf import register
from roundel.measure import Evaluation, evaluate
from roundel.pipeline import Quantized, collect_factors, export, export_imatrix, quantize, tune
from roundel.recipes import Recipe

register()  # from here on Transformers loads Roundel's own checkpoints

__version__ = importlib.metadata.version("roundel")

__all__ = [
    "Evaluation",
    "Quantized",
    "Recipe",
    "RoundelError",
    "__version__",
    "collect_factors",
    "evaluate",
    "export",
    "export_imatrix",
    "quantize",
    "tune",
]
