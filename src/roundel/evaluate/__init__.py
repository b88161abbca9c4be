"""How far a model's output distribution is from another's, and the page that says so."""

from roundel.evaluate.divergence import Divergence, Logits, Span, compare_models

__all__ = ["Divergence", "Logits", "Span", "compare_models"]
