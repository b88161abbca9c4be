"""Numbers that break other tools: through every grid with its roundings, every estimator and every format that holds the grid.

What cannot be used is said (scale 0, an error with its reason); what is used is finite, and its loss never rises.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laws.problems import draw
from laws.test_grids import NAMES
from laws.test_sketches import MORE as MORE_ESTIMATORS
from laws.test_sketches import factors_of_each_pass, groups_of
from roundel.curvature.sketches import ESTIMATORS, parse_curvature
from roundel.errors import SchemeError
from roundel.formats import FORMATS
from roundel.grids import parse_scheme
from roundel.rounding import make_problem
from roundel.rounding.round import dequantized, round_weight
from roundel.types import KroneckerFactors

D_OUT, D_IN = 8, 256
TILES = ["lattice2", "trellis2-s6", "trellis3-3inst-s8", "trellis2-hyb-s7", "iq2_xxs", "iq3_s"]
FREE = torch.bfloat16


def weights(kind: str, seed: int) -> Tensor:
    """A weight of which something is unusual."""
    W = 0.02 * draw(D_OUT, D_IN, seed=seed, dtype=torch.float32)
    match kind:
        case "zeros":
            W.zero_()
        case "subnormal":
            W *= 1e-40
        case "tiny":
            W *= 1e-30
        case "outlier":
            W[seed % D_OUT, seed % D_IN] = 1e30
        case "constant rows":
            W[:] = W[:, :1]
        case "dead channels":
            W[:, ::3] = 0
            W[::5] = 0
        case "rank one":
            W = W[:, :1] * W[:1] * 50
        case "two sizes":
            W[: D_OUT // 2] *= 1e20
    return W


def factor(kind: str, d: int, seed: int) -> Tensor:
    """A positive semi-definite matrix with a mean diagonal of 1."""
    x = draw(d, 2 * d, seed=seed, dtype=torch.float32)
    match kind:
        case "rank one":
            x = x[:, :1]
        case "dead channels":
            x[::2] = 0
        case "one channel":
            x[1:] = 0
        case "outlier":
            x[0] *= 1e6
    H = x @ x.T
    return H / H.diagonal().mean()


WEIGHTS = ["zeros", "subnormal", "tiny", "outlier", "constant rows", "dead channels", "rank one", "two sizes"]
FACTORS = ["full", "rank one", "dead channels", "one channel", "outlier"]
hard = given(kind=st.sampled_from(WEIGHTS), out=st.sampled_from(FACTORS), into=st.sampled_from(FACTORS), seed=st.integers(0, 99))


@pytest.mark.parametrize("name", [*NAMES, *TILES])
@hard
@settings(max_examples=2, deadline=None)
def test_every_grid_and_every_format_that_holds_it(name: str, kind: str, out: str, into: str, seed: int) -> None:
    grid = parse_scheme(name)
    factors = KroneckerFactors(H_out=factor(out, D_OUT, seed), H_in=factor(into, D_IN, seed + 1), scale=1.0)
    problem = make_problem(weights(kind, seed), factors, damping=0.01)
    rounded = round_weight(problem, grid, sweeps=2, scale_dtype=FREE)
    assert all(map(math.isfinite, rounded.trace))
    assert all(later <= earlier for earlier, later in itertools.pairwise(rounded.trace))
    W_hat = dequantized(rounded)
    assert W_hat.isfinite().all()
    for form in FORMATS.values():
        try:
            form.check_weight(rounded)
            tensors = form.pack(rounded)
        except SchemeError:
            continue
        assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32))
        back = form.unpack(tensors, grid, rounded.shape)
        assert torch.equal(dequantized(back), W_hat), form.name


def stream(kind: str, sequences: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and gradients of which something is unusual."""
    x, g = draw(sequences, tokens, 9, seed=seed, dtype=torch.float32), draw(sequences, tokens, 6, seed=seed + 1, dtype=torch.float32)
    match kind:
        case "nan":
            x[-1, 0, 0] = float("nan")
        case "infinite gradient":
            g[0, -1, 1] = float("inf")
        case "overflow":
            x *= 1e30
            g *= 1e30
        case "beyond float16":
            x[..., 3] *= 1e6
        case "underflow":
            g *= 1e-38
            x *= 1e-10
        case "subnormal":
            g *= 1e-42
        case "identical tokens":
            x[:], g[:] = x[:1, :1], g[:1, :1]
        case "dead channels":
            x[..., ::2], g[..., 1:] = 0, 0
        case "one token":
            g[:, 1:] = 0
        case "outlier":
            x[0, 0] *= 1e15
    return x, g


STREAMS = ["nan", "infinite gradient", "overflow", "beyond float16", "underflow", "subnormal", "identical tokens", "dead channels"]
STREAMS += ["one token", "outlier"]


@pytest.mark.parametrize("name", [*ESTIMATORS, *MORE_ESTIMATORS])
@given(kind=st.sampled_from(STREAMS), sequences=st.integers(1, 4), tokens=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_every_estimator_is_usable_or_says_that_it_is_not(name: str, kind: str, sequences: int, tokens: int, seed: int) -> None:
    estimator = parse_curvature(name)
    factors = factors_of_each_pass(estimator, *stream(kind, sequences, tokens, seed))[-1]
    if factors.scale == 0:
        return
    assert math.isfinite(factors.scale)
    for group in groups_of(factors):
        assert group.H_out.isfinite().all()
        assert group.H_in.isfinite().all()
        problem = make_problem(draw(group.H_out.shape[0], 9, seed=seed, dtype=torch.float32), group, damping=0.01)
        assert problem.L_in.isfinite().all()
        assert problem.L_out.isfinite().all()
