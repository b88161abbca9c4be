"""Transforms are orthonormal, flat and fast to state densely; rotations leave the loss alone and make weights look Gaussian."""

import dataclasses
import math

import pytest
import torch

from laws.problems import draw
from roundel.errors import SchemeError
from roundel.linalg.hadamard import block_hadamard, hadamard
from roundel.rotation import KINDS, Rotation
from roundel.types import KroneckerFactors

WIDTHS = [9728, 17408, 25600, 18944, 29568, 4864, 21504, 5376, 4096, 14336, 11008, 53248, 172, 896, 127, 4001]
HARTLEY = {11008, 172, 127, 4001}
"""Those of `WIDTHS` that no product of small Paley matrices reaches."""


def dense(n: int) -> torch.Tensor:
    """`H_n`, column by column."""
    return hadamard(torch.eye(n, dtype=torch.float64)).T


def spd(d: int, seed: int) -> torch.Tensor:
    A = draw(d, d + 3, seed=seed)
    H = A @ A.T
    return H / H.diagonal().mean()


def factors(d_out: int, d_in: int) -> KroneckerFactors:
    return KroneckerFactors(H_out=spd(d_out, 1), H_in=spd(d_in, 2), scale=0.25, carry={"left": torch.ones(1)})


@pytest.mark.parametrize("n", range(1, 81))
def test_small_matrices_are_orthonormal_and_flat(n: int) -> None:
    H = dense(n)
    torch.testing.assert_close(H @ H.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard(torch.eye(n, dtype=torch.float64), transpose=True), H, rtol=0, atol=1e-12)
    assert H.abs().max() <= math.sqrt(2 / n) * (1 + 1e-12)


@pytest.mark.parametrize("order", [12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 100, 108, 124, 140, 148, 180, 196, 204, 228, 244, 252])
def test_paley_orders_are_hadamard_matrices(order: int) -> None:
    H = dense(order) * math.sqrt(order)
    torch.testing.assert_close(H.abs(), torch.ones_like(H), rtol=0, atol=1e-12)
    torch.testing.assert_close(H @ H.T, order * torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [3, 7, 43, 6, 86])
def test_other_odd_parts_are_hartley_transforms(n: int) -> None:
    odd = n if n % 2 else n // 2
    angle = 2 * math.pi / odd * torch.arange(odd, dtype=torch.float64).outer(torch.arange(odd, dtype=torch.float64))
    expected = (angle.cos() + angle.sin()) / math.sqrt(odd)
    if n % 2 == 0:
        expected = torch.kron(expected, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2))
    torch.testing.assert_close(dense(n), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", WIDTHS)
def test_wide_transforms_keep_inner_products_and_invert(n: int) -> None:
    x = draw(3, n, seed=n)
    y = hadamard(x)
    torch.testing.assert_close(y @ y.T / n, x @ x.T / n, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hadamard(y, transpose=True), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard(x.float()), y.float(), rtol=0, atol=1e-5)
    # <u, H v> = <H^T u, v>
    torch.testing.assert_close(x[0] @ hadamard(x[1]), hadamard(x[0], transpose=True) @ x[1], rtol=0, atol=1e-9)
    one = torch.zeros(n, dtype=torch.float64)
    one[n // 3] = 1
    bound = math.sqrt(2 / n) if n in HARTLEY else math.sqrt(1 / n)
    assert hadamard(one).abs().max() <= bound * (1 + 1e-12)


@pytest.mark.parametrize("n", [1, 2, 8, 128, 1024])
def test_powers_of_two_are_sylvesters(n: int) -> None:
    signs = [[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(min(n, 128))]
    torch.testing.assert_close(dense(n)[:128], torch.tensor(signs, dtype=torch.float64) / math.sqrt(n), rtol=0, atol=1e-14)


def test_the_block_form_is_a_block_diagonal_matrix() -> None:
    H = torch.tensor([[(-1) ** (i & j).bit_count() for j in range(128)] for i in range(128)], dtype=torch.float64) / math.sqrt(128)
    x = draw(2, 5, 384, seed=1)
    torch.testing.assert_close(block_hadamard(x), x @ torch.kron(torch.eye(3, dtype=torch.float64), H), rtol=0, atol=1e-12)
    with pytest.raises(SchemeError, match="128 do not divide the width 172; try"):
        block_hadamard(draw(2, 172, seed=1))


def test_transforms_can_be_differentiated_even_if_first_used_for_inference() -> None:
    x = draw(2, 132, seed=3)
    with torch.inference_mode():
        hadamard(x)
    x.requires_grad_()
    direction = draw(2, 132, seed=4)
    (gradient,) = torch.autograd.grad((hadamard(x) * direction).sum(), x)
    torch.testing.assert_close(gradient, hadamard(direction, transpose=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("x", [torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(2, 0)], ids=["type", "width"])
def test_what_cannot_be_transformed_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected at least 1 of float32 or float64"):
        hadamard(x)


def test_no_vectors_give_no_vectors() -> None:
    assert hadamard(torch.ones(0, 24)).shape == (0, 24)


SHAPES = [
    ("hadamard", 7, 12),
    ("hadamard", 20, 9),
    ("hadamard", 24, 35),
    ("hadamard", 1, 3),
    ("hadamard128", 128, 384),
    ("hadamard128", 100, 130),
]


@pytest.mark.parametrize(("kind", "d_out", "d_in"), SHAPES)
def test_the_proxy_loss_does_not_change(kind: str, d_out: int, d_in: int) -> None:
    rotation, given = Rotation.draw(d_out, d_in, kind, 5), factors(d_out, d_in)
    rotated = rotation.rotate_factors(given)
    E = draw(d_out, d_in, seed=3)
    before = torch.trace(E.T @ given.H_out @ E @ given.H_in)
    R = rotation.rotate_weight(E)
    torch.testing.assert_close(torch.trace(R.T @ rotated.H_out @ R @ rotated.H_in), before, rtol=1e-11, atol=0)
    assert rotated.scale == given.scale
    assert not rotated.carry
    for side, d in ((rotated.H_out, d_out), (rotated.H_in, d_in)):
        assert torch.equal(side, side.T)
        torch.testing.assert_close(side.trace().item(), float(d))


@pytest.mark.parametrize(("kind", "d_out", "d_in"), SHAPES)
def test_rotations_are_the_stated_products_and_invert(kind: str, d_out: int, d_in: int) -> None:
    rotation, W, x = Rotation.draw(d_out, d_in, kind, 6), draw(d_out, d_in, seed=1), draw(4, d_in, seed=2)
    sides = []
    for d, signs in ((d_out, rotation.signs_out), (d_in, rotation.signs_in)):
        H = dense(d) if kind == "hadamard" else torch.block_diag(*[dense(128)] * -(-d // 128))
        sides.append((H * signs)[:, :d])  # the others meet the zeros that are added
    assert rotation.rotated_shape((d_out, d_in)) == (len(sides[0]), len(sides[1]))
    rotated = rotation.rotate_weight(W)
    torch.testing.assert_close(rotated, sides[0] @ W @ sides[1].T, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation.restore_weight(rotated), W, rtol=0, atol=1e-12)
    given = factors(d_out, d_in)
    torch.testing.assert_close(rotation.rotate_factors(given).H_in, sides[1] @ given.H_in @ sides[1].T, rtol=0, atol=1e-11)
    torch.testing.assert_close(rotation.rotate_factors(given).H_out, sides[0] @ given.H_out @ sides[0].T, rtol=0, atol=1e-11)
    through = rotation.restore_output(rotation.rotate_input(x) @ rotated.T)
    torch.testing.assert_close(through, x @ W.T, rtol=0, atol=1e-11)
    torch.testing.assert_close(rotation.restore_weight(rotation.rotate_weight(W.float())), W.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("d_out", "d_in"), [(127, 172), (256, 384), (43, 1)])
def test_one_outlier_is_spread_over_the_whole_weight(d_out: int, d_in: int) -> None:
    rotation, W = Rotation.draw(d_out, d_in, "hadamard", 0), torch.zeros(d_out, d_in, dtype=torch.float64)
    W[d_out // 2, d_in // 3] = 1
    assert rotation.rotate_weight(W).abs().max() <= 2 / math.sqrt(d_out * d_in) * (1 + 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_heavy_tails_become_gaussian(kind: str) -> None:
    W = draw(256, 640, seed=8)
    W = W * draw(256, 640, seed=9).exp() * draw(640, seed=10).exp()
    rotated = Rotation.draw(256, 640, kind, 1).rotate_weight(W)
    before, after = (((M - M.mean()) ** 4).mean() / M.var() ** 2 for M in (W, rotated))
    assert before > 50
    assert 2.9 < after < 3.1 if kind == "hadamard" else after < 6  # blocks keep their own sizes


def test_signs_come_from_the_seed() -> None:
    one, same, other = (Rotation.draw(64, 96, "hadamard", seed) for seed in (1, 1, 2))
    assert torch.equal(one.signs_in, same.signs_in)
    assert torch.equal(one.signs_out, same.signs_out)
    assert not torch.equal(one.signs_in, other.signs_in)
    assert not torch.equal(one.signs_in[:64], one.signs_out)
    assert torch.equal(one.signs_in, Rotation.draw(7, 96, "hadamard", 1).signs_in)
    assert one.signs_in.dtype == one.signs_out.dtype == torch.int8
    assert set(one.signs_in.tolist()) == {-1, 1}


def test_bad_rotations_are_refused() -> None:
    good = Rotation.draw(4, 4, "hadamard", 0)
    with pytest.raises(ValueError, match="4 and 4 signs for a weight of"):
        dataclasses.replace(good, kind="hadamard128")
    with pytest.raises(SchemeError, match="expected one of hadamard, hadamard128"):
        dataclasses.replace(good, kind="fourier")
    for wrong in (torch.zeros(4, dtype=torch.int8), torch.ones(2, 2, dtype=torch.int8)):
        with pytest.raises((ValueError, TypeError)):
            dataclasses.replace(good, signs_in=wrong)
