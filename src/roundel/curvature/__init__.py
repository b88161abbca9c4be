"""Curvature of the model's KL in each linear, from one stream of per-sequence gradients.

The backward sweep (`sweeps.gradient_visits`) brings each linear's input and output gradient, a sketch from `sketches` sums them up inside
the backward pass, `collect` runs the passes. Nothing is stored but the sums.
"""

from roundel.curvature.choose import choose
from roundel.curvature.collect import collect, inner_products, predicted_kl
from roundel.curvature.sketches import Candidate, Estimator, Sketch, parse_curvature

__all__ = ["Candidate", "Estimator", "Sketch", "choose", "collect", "inner_products", "parse_curvature", "predicted_kl"]
