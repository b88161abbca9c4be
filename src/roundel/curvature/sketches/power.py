"""Power iteration on the whole Fisher, carried on: `sketch-b` with more rounds. The nearest Kronecker product, and FastKron's target.

The best approximation of the Fisher by one Kronecker product in the Frobenius norm is the leading singular pair of the rearranged
Fisher `R(V) = E[G V G^T]` (Van Loan and Pitsianis 1993). `H_out <- R(H_in)`, `H_in <- R^T(H_out)`, both at once, are two interleaved power
iterations that converge to it at the rate of the two leading singular values per pass. `R` maps positive semi-definite matrices to
such, so every iterate is one; FastKron (ACL 2026) goes to the same pair by Lanczos, whose iterates need not be.

The most similar factors are not the best ones to round with: in our measurements the converged pair gave a larger KL than a
single pass of `kfac`, `sketch-b` or their mean. It is here to be compared with.

Cost per token, in sequences of `T`: in the first pass that of `sketch-b`, `2 d_in d_out + d_in d_out (d_in + d_out) / T` flops or less; in
each other that of `weighted`, `2 d_in d_out + 3 d_in d_out (d_in + d_out) / T` or less. Memory `8 (d_in^2 + d_out^2)` bytes, and two `G`.
"""

from __future__ import annotations

from dataclasses import dataclass

from roundel.curvature.sketches.sketch_b import SketchB

__all__ = ["Power"]


@dataclass(frozen=True, kw_only=True)
class Power(SketchB):
    """`sketch-b` with `rounds` passes, by default enough to come close to the leading singular pair."""

    rounds: int = 8
