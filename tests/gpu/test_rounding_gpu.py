"""Rounding on a GPU: Triton's kernels against the torch specifications, code for code, and whole weights against those of the CPU."""

import pytest
import torch

from laws.problems import covariance, draw, scales_for, with_factors
from roundel.grids import ScalarGrid, TileGrid, parse_scheme
from roundel.linalg import viterbi
from roundel.rounding import nearest, round_weights
from roundel.rounding.descent import sweep, sweep_waves
from roundel.rounding.feedback import feedback, feedback_waves
from roundel.rounding.round import dequantized
from roundel.types import RoundingProblem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def moved(problem: RoundingProblem, device: str) -> RoundingProblem:
    tensors = {name: getattr(problem, name).to(device) for name in ("W", "H_out", "H_in", "L_out", "L_in", "D_out", "D_in")}
    return RoundingProblem(**tensors, scale=problem.scale, damping=problem.damping)


def problem_of(d_out: int, d_in: int, dtype: torch.dtype = torch.float64) -> RoundingProblem:
    problem = with_factors(draw(d_out, d_in, seed=d_out), covariance(d_out, 1), covariance(d_in, 3), damping=0.1)
    return RoundingProblem(
        **{name: getattr(problem, name).to(dtype) for name in ("W", "H_out", "H_in", "L_out", "L_in", "D_out", "D_in")},
        scale=problem.scale,
        damping=problem.damping,
    )


@pytest.mark.parametrize("scheme", ["int4-g32", "int2-channel", "int3-g32-asym", "mxfp4", "nvfp4", "q4_0", "iq4_nl", "fp8"])
@pytest.mark.parametrize("shape", [(130, 192), (65, 96), (1, 352)], ids=str)
def test_feedback_and_sweep_are_the_specifications(scheme: str, shape: tuple[int, int]) -> None:
    """In float64, where no target lies at a boundary between two codes; the specifications, step by step, run on the CPU."""
    from roundel.kernels import triton_rounding

    grid, near = parse_scheme(scheme), problem_of(*shape)
    assert isinstance(grid, ScalarGrid)
    problem, scales = moved(near, "cuda"), scales_for(near, grid)
    there = {name: scale.cuda() for name, scale in scales.items()}
    fed = feedback(problem, grid, there).cpu()
    assert torch.equal(fed, feedback_waves(near, grid, scales))
    start = nearest(near.W, grid, scales)
    assert torch.equal(sweep(problem, grid, there, start.cuda()).cpu(), sweep_waves(near, grid, scales, start, tile=triton_rounding.TILE))
    assert not torch.equal(fed, start)


@pytest.mark.parametrize("scheme", ["trellis1", "trellis2", "trellis3-hyb", "trellis4-mcg", "trellis2-s12-c4", "trellis8"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_best_walk_is_the_specifications(scheme: str, weighted: bool) -> None:
    from roundel.grids.trellis import REACH
    from roundel.kernels import triton_viterbi

    grid = parse_scheme(scheme)
    random = torch.Generator().manual_seed(1)
    targets = torch.randn(3, 256 // grid.values, grid.values, generator=random).cuda()
    weights = torch.rand(targets.shape, generator=random).cuda() if weighted else None
    options = {"candidates": grid.candidates, "reach": REACH // grid.values}
    expected, its_cost = viterbi.circular_path(targets, grid.table.cuda(), grid.shift, weights, **options)
    found, cost = triton_viterbi.circular_path(targets, grid.table.cuda(), grid.shift, weights, **options)
    assert torch.equal(found, expected)
    assert torch.equal(cost, its_cost)


@pytest.mark.parametrize("scheme", ["int3-g32", "q4_k", "q2_k", "nvfp4", "lattice2", "trellis2-s10", "trellis2"])
def test_weights_are_rounded_as_well_as_on_the_cpu(scheme: str) -> None:
    """float32: sums in other orders take some codes to the other side of a boundary, which costs and gains nothing on average."""
    grid = parse_scheme(scheme)
    problems = [problem_of(128, 256, torch.float32), problem_of(48, 512, torch.float32)]
    losses = {}
    for device in ("cpu", "cuda"):
        found = round_weights([moved(p, device) for p in problems], grid, sweeps=2, scale_dtypes=[torch.float16] * 2)
        losses[device] = [weight.trace[-1] for weight in found]
        for problem, weight in zip(problems, found, strict=True):
            assert weight.codes.device.type == device
            W_hat = dequantized(weight).cpu()
            assert problem.loss(problem.W - W_hat) == pytest.approx(weight.trace[-1], rel=1e-3)
            assert all(later <= earlier for earlier, later in zip(weight.trace, weight.trace[1:], strict=False))
    assert sum(losses["cuda"]) == pytest.approx(sum(losses["cpu"]), rel=0.04)


def test_tile_grids_decode_alike_on_both() -> None:
    for scheme in ("lattice2", "trellis3-hyb", "trellis2-3inst"):
        grid = parse_scheme(scheme)
        assert isinstance(grid, TileGrid)
        codes = grid.encode_tiles(torch.randn(5, 8 if scheme == "lattice2" else 256, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(grid.decode_tiles(codes.cuda()).cpu(), grid.decode_tiles(codes))
