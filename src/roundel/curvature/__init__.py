"""Curvature of the model's KL in each linear, from one stream of per-sequence gradients.

`fisher` sends label gradients back through the model, `tap` catches each linear's input and output gradient, a sketch
from `sketches` sums them up inside the backward pass, `collect` runs the passes. Nothing is stored but the sums.
"""

from roundel.curvature.collect import collect, predicted_kl
from roundel.curvature.sketches import Estimator, Sketch, parse_curvature

__all__ = ["Estimator", "Sketch", "collect", "parse_curvature", "predicted_kl"]
