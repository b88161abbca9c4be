"""How far a model's output distribution is from another's, and the page that says so."""

from roundel.evaluate.divergence import Comparison, Divergence, Logits, ModelLogits, Span, compare_models

__all__ = ["Comparison", "Divergence", "Logits", "ModelLogits", "Span", "compare_models"]
