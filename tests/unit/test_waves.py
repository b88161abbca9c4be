"""Waves of tiles: each tile once, no two of a row or column together, fewer after a wave that disappointed."""

import itertools

import pytest
import torch

from laws.problems import covariance, draw, scales_for, with_factors
from roundel.grids import ScalarGrid, parse_scheme
from roundel.kernels.waves import Waves
from roundel.rounding import feedback, nearest
from roundel.rounding.descent import sweep, sweep_waves


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (3, 7), (7, 3), (5, 5)], ids=str)
@pytest.mark.parametrize("gain", [1.0, 0.7, 0.1, -1.0])
def test_each_tile_is_taken_once(shape: tuple[int, int], gain: float) -> None:
    waves, seen = Waves(*shape), []
    while wave := waves.next():
        rows, columns = zip(*wave, strict=True)
        assert len(set(rows)) == len(set(columns)) == len(wave)
        if waves.took(gain, 1.0):
            seen += wave
    assert sorted(seen) == [(i, j) for i in range(shape[0]) for j in range(shape[1])]


def test_what_a_wave_gained_says_how_many_are_next() -> None:
    waves, sizes = Waves(8, 9), []
    for gain in (1.0, 0.7, 0.2, 0.7, -1.0, 0.95, 0.4, -1.0, 1.0):
        sizes.append(len(waves.next()))
        assert waves.took(gain, 1.0) == (gain > 0.5 or sizes[-1] == 1)
    assert sizes == [8, 8, 8, 4, 4, 2, 2, 1, 1]


@pytest.mark.parametrize("shared", [0.0, 1.0, 30.0])
def test_waves_lower_the_loss_as_tiles_do(shared: float) -> None:
    """Also where all channels share a direction, so that all tiles at once would overshoot; after feedback few changes are left there."""
    grid = parse_scheme("int3-g32")
    assert isinstance(grid, ScalarGrid)
    H_out, H_in = (H + shared * H.diagonal().mean() for H in (covariance(96, 1), covariance(128, 2)))
    problem = with_factors(draw(96, 128, seed=3), H_out, H_in, damping=0.05)
    scales = scales_for(problem, grid)

    def loss(codes: torch.Tensor) -> float:
        return problem.loss(problem.W - grid.dequantize(codes, scales, problem.shape, problem.W.dtype))

    for start, least in ((nearest(problem.W, grid, scales), 0.9), (feedback(problem, grid, scales), 0.05)):
        swept, expected, losses = start, start, [loss(start)]
        for _ in range(3):
            swept, expected = sweep_waves(problem, grid, scales, swept, tile=(8, 16)), sweep(problem, grid, scales, expected)
            losses.append(loss(swept))
        assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
        assert losses[0] - losses[-1] > least * (losses[0] - loss(expected))
