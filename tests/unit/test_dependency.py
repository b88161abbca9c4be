"""The depth of feedback's dependencies against powers of the support's matrix."""

import pytest
import torch
from torch import Tensor

from laws.problems import draw
from roundel.linalg.dependency import structural_nilpotence, waves


def sparse_unit_lower(d: int, seed: int, density: float = 0.15) -> Tensor:
    values, chance = draw(d, d, seed=seed), torch.rand(d, d, generator=torch.Generator().manual_seed(seed))
    return torch.eye(d, dtype=torch.float64) + torch.where(chance < density, values, torch.zeros_like(values)).tril(-1)


def nilpotence(L: Tensor) -> int:
    """Smallest k with N^k = 0, by multiplication."""
    N = (L - torch.eye(len(L), dtype=L.dtype)).ne(0).double()
    power, k = N.clone(), 1
    while power.any():
        power, k = (power @ N).ne(0).double(), k + 1
    return k


@pytest.mark.parametrize("d", [1, 2, 9, 40])
@pytest.mark.parametrize("density", [0.02, 0.15, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_smallest_vanishing_power(d: int, density: float, seed: int) -> None:
    L = sparse_unit_lower(d, seed, density)
    assert structural_nilpotence(L) == nilpotence(L)


def test_extremes() -> None:
    eye = torch.eye(12)
    assert structural_nilpotence(eye) == 1
    assert structural_nilpotence(torch.ones(12, 12).tril()) == 12
    assert structural_nilpotence(eye + torch.diag(torch.ones(11), -1)) == 12  # a single chain
    star = eye.clone()
    star[1:, 0] = 1
    assert structural_nilpotence(star) == 2
    assert structural_nilpotence(star + torch.triu(torch.ones(12, 12), 1)) == 2  # nothing above the diagonal is read


def test_rounding_errors_are_no_dependencies() -> None:
    L = torch.eye(6, dtype=torch.float64) + 1e-12 * torch.ones(6, 6, dtype=torch.float64).tril(-1)
    assert structural_nilpotence(L) == 1
    assert structural_nilpotence(L, tolerance=0.0) == 6


@pytest.mark.parametrize("tile", [1, 3, 4, 7, 50])
def test_tiles_are_nodes(tile: int) -> None:
    L, d = sparse_unit_lower(22, 5, 0.05), 22
    coarse = torch.eye(-(-d // tile), dtype=torch.float64)
    for i, j in torch.nonzero(L.tril(-1)).tolist():
        if i // tile != j // tile:
            coarse[i // tile, j // tile] = 1
    assert structural_nilpotence(L, tile=tile) == nilpotence(coarse)


def test_waves_of_dense_and_of_independent_factors() -> None:
    dense_out, dense_in = torch.ones(16, 16).tril(), torch.ones(24, 24).tril()
    assert waves(dense_out, dense_in) == 16 + 24 - 1
    assert waves(dense_out, dense_in, tile=8) == 2 + 3 - 1
    assert waves(torch.eye(16), dense_in) == 24
    assert waves(torch.eye(16), torch.eye(24)) == 1
