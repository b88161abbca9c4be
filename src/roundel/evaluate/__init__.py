"""How far a model's output distribution is from another's, and the page that says so."""

from roundel.evaluate.divergence import Divergence, compare_models

__all__ = ["Divergence", "compare_models"]
