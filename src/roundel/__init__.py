"""Roundel shrinks a language model to 2-8 bits per weight while keeping its output distribution."""

import importlib.metadata

from roundel.commands.evaluate import Evaluation, evaluate
from roundel.errors import RoundelError
from roundel.integration.quantizer import register
from roundel.recipes import Recipe
from roundel.stages.curvature import collect_factors
from roundel.stages.export import export, export_imatrix
from roundel.stages.quantize import quantize
from roundel.stages.report import Quantized
from roundel.stages.tune import tune

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
