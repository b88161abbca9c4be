"""Random rounding problems, as the laws and the oracles draw them."""

import torch
from torch import Tensor

from roundel.grids import Grid, Scales
from roundel.rounding import make_problem
from roundel.types import KroneckerFactors, RoundedWeight, RoundingProblem


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def covariance(d: int, seed: int) -> Tensor:
    """A strongly correlated, rank-deficient second moment, as calibration data give it."""
    samples = draw(d // 2 + 2, d, seed=seed) @ (torch.eye(d, dtype=torch.float64) + 0.5 * draw(d, d, seed=seed + 1))
    H = samples.T @ samples
    return H / H.diagonal().mean()


def random_problem(d_out: int, d_in: int, *, seed: int, damping: float = 0.1, dtype: torch.dtype = torch.float64) -> RoundingProblem:
    factors = KroneckerFactors(H_out=covariance(d_out, 4 * seed), H_in=covariance(d_in, 4 * seed + 2), scale=1.0)
    return make_problem(draw(d_out, d_in, seed=seed + 1000), factors, damping=damping, dtype=dtype)


def with_factors(W: Tensor, H_out: Tensor, H_in: Tensor, *, damping: float = 1e-6) -> RoundingProblem:
    return make_problem(W, KroneckerFactors(H_out=H_out, H_in=H_in, scale=1.0), damping=damping, dtype=W.dtype)


def scales_for(problem: RoundingProblem, grid: Grid, dtype: torch.dtype = torch.float32) -> Scales:
    return grid.fit_scales(problem.W, problem.H_in.diagonal(), dtype)


def of(grid: Grid, codes: Tensor, scales: Scales | Tensor) -> RoundedWeight:
    """Codes and scales (a bare tensor is that of integers) as a rounded weight."""
    known = {"scale": scales} if isinstance(scales, Tensor) else dict(scales)
    return RoundedWeight(scheme=grid.name, codes=codes, scales=known, shape=(codes.shape[0], codes.shape[1]))


def loss(problem: RoundingProblem, grid: Grid, rounded: RoundedWeight) -> float:
    """The proxy loss by its definition, in float64."""
    E = problem.W.double() - grid.dequantize(rounded.codes, rounded.scales, problem.shape, torch.float64)
    return 0.5 * torch.trace(E.T @ problem.H_out.double() @ E @ problem.H_in.double()).item()
