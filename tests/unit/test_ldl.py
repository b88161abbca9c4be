"""Unit lower triangular factors and their damping."""

import pytest
import torch

from laws.problems import covariance, draw
from roundel.errors import NumericalError
from roundel.linalg.ldl import damped_ldl, ldl


@pytest.mark.parametrize("d", [1, 2, 17])
def test_ldl_multiplies_back(d: int) -> None:
    H = covariance(d, seed=d) + 0.1 * torch.eye(d, dtype=torch.float64)
    found = ldl(H)
    assert found is not None
    L, D = found
    torch.testing.assert_close(L @ torch.diag(D) @ L.T, H)
    assert torch.equal(L, L.tril())
    assert torch.equal(L.diagonal(), torch.ones(d, dtype=torch.float64))
    assert (D > 0).all()


@pytest.mark.parametrize(
    "H", [-torch.eye(3), torch.zeros(3, 3), torch.ones(3, 3) - 2 * torch.eye(3)], ids=["negative", "zero", "indefinite"]
)
def test_there_is_no_ldl_of_an_indefinite_matrix(H: torch.Tensor) -> None:
    assert ldl(H) is None


def test_factors_are_float64_whatever_is_given() -> None:
    damped, L, _ = damped_ldl(covariance(5, seed=1).float(), 0.1)
    assert damped.dtype == L.dtype == torch.float64


def test_damping_is_relative_to_the_mean_diagonal() -> None:
    H = 7 * covariance(6, seed=2)
    damped, L, used = damped_ldl(H, 0.25)
    assert used == 0.25
    torch.testing.assert_close(damped, H + 0.25 * 7 * torch.eye(6, dtype=torch.float64))
    D = torch.linalg.solve_triangular(L, damped, upper=False)
    torch.testing.assert_close(D, D.diagonal()[:, None] * L.T)


def test_an_asymmetric_factor_is_symmetrised() -> None:
    H = covariance(4, seed=3)
    skewed = H + torch.triu(draw(4, 4, seed=4), 1) * 0.1
    damped, _, _ = damped_ldl(skewed, 1.0)
    torch.testing.assert_close(damped, damped.T)
    torch.testing.assert_close(damped, (skewed + skewed.T) / 2 + skewed.diagonal().mean() * torch.eye(4, dtype=torch.float64))


def test_damping_grows_until_it_is_enough() -> None:
    H = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05]))
    _, _, used = damped_ldl(H, 0.001)
    assert used == pytest.approx(0.1)


def test_a_hopeless_factor_is_refused() -> None:
    with pytest.raises(NumericalError, match="stays indefinite"):
        damped_ldl(-torch.eye(3), 0.1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    H = torch.eye(3)
    H[1, 1] = value
    with pytest.raises(NumericalError, match="not finite"):
        damped_ldl(H, 0.1)
