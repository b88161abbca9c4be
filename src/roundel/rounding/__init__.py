"""Rounding one weight under Kronecker-factored curvature. Nothing here ever sees a model.

problem   damped factors and their LDL from measured ones
nearest   the grid's own rounding: the answer for diagonal factors
feedback  one pass with the error fed back on both sides
descent   coordinate descent on the codes, then on the scales, never raising the proxy loss
"""

from roundel.rounding.descent import sweep
from roundel.rounding.feedback import feedback
from roundel.rounding.nearest import nearest
from roundel.rounding.problem import make_problem
from roundel.rounding.round import round_weight, round_weights
from roundel.rounding.scale import refit_scales

__all__ = ["feedback", "make_problem", "nearest", "refit_scales", "round_weight", "round_weights", "sweep"]
