"""The lattice's coder against all of its codewords, and what is claimed of them."""

import pytest
import torch

from laws.problems import draw
from roundel.grids.base import HEADROOM
from roundel.grids.lattice import Lattice, parse

GRID = Lattice()
ALL = torch.arange(1 << 16, dtype=torch.int32)[:, None]


def points() -> torch.Tensor:
    return GRID.decode_tiles(ALL)


def least(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The smallest weighted squared distance to any codeword, from all of them."""
    book = points().double()
    return ((x * x * w).sum(1)[:, None] - 2 * (x * w) @ book.T + w @ (book * book).T).amin(1)


def rounded(W: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    scales = GRID.fit_scales(W, torch.ones(W.shape[1]), torch.float32)
    entries = None if weights is None else GRID.to_tiles(weights)
    down, across = W.shape[0], -(-W.shape[1] // 8)
    codes = GRID.encode_tiles(GRID.to_tiles(W) / scales["scale"], entries).unflatten(0, (down, across))
    assert codes.shape == (down, across, 1)
    return GRID.dequantize(codes, scales, (W.shape[0], W.shape[1]), W.dtype)


def test_codewords_are_distinct_points_of_the_shifted_lattice() -> None:
    book = points()
    assert len(torch.unique(book, dim=0)) == 1 << 16
    assert book.dtype == torch.float32
    # E8: all integers or all halves of odd ones, with an even sum. E8 + 1/4 = E8 - 1/4 + (1/2, ..., 1/2).
    shifted = book - 0.25
    doubled = (2 * shifted).long()
    assert torch.equal(doubled, 2 * shifted)
    assert ((doubled % 2).amax(1) == (doubled % 2).amin(1)).all()
    assert (shifted.sum(1) % 2 == 0).all()
    shift = torch.where(ALL >> 7 & 1 == 1, -0.25, 0.25)
    norms, counts = (book - shift).square().sum(1).unique(return_counts=True)
    assert dict(zip(norms.tolist(), (counts // 256).tolist(), strict=True)) == {2: 1, 4: 8, 6: 28, 8: 64, 10: 126, 12: 29}
    assert GRID.rms == pytest.approx(book.double().square().mean().sqrt().item(), rel=1e-6)
    assert (book.square().mean(0).sqrt() / GRID.rms - 1).abs().max() < 0.03


def test_every_codeword_is_coded_as_itself() -> None:
    assert torch.equal(GRID.encode_tiles(points()), ALL)
    assert torch.equal(GRID.encode_tiles(points().double(), draw(1 << 16, 8, seed=1).abs() + 0.01), ALL)


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("spread", [None, 1, 4])
def test_the_nearest_of_all_codewords_is_found(size: float, spread: int | None) -> None:
    x = size * draw(200, 8, seed=int(10 * size))
    w = None if spread is None else draw(200, 8, seed=7).abs() ** spread
    if w is not None:
        w[:50, 5] = 0
        w[:20, 2:] = 0
    codes = GRID.encode_tiles(x, w)
    assert codes.dtype == torch.int32
    assert codes.shape == (200, 1)
    every = torch.ones_like(x) if w is None else w
    error = (every * (x - GRID.decode_tiles(codes)) ** 2).sum(1)
    torch.testing.assert_close(error, least(x, every), rtol=1e-9, atol=1e-9 * size**2)


def test_single_precision_costs_nothing() -> None:
    x, w = draw(200, 8, seed=2), draw(200, 8, seed=3).abs()
    error = (w * (x - GRID.decode_tiles(GRID.encode_tiles(x.float(), w.float()))) ** 2).sum(1)
    torch.testing.assert_close(error, least(x, w), rtol=1e-5, atol=1e-5)


def test_tiles_do_not_depend_on_those_beside_them() -> None:
    x, w = draw(2500, 8, seed=4, dtype=torch.float32), draw(2500, 8, seed=5, dtype=torch.float32).abs()
    codes = GRID.encode_tiles(x, w)
    alone = torch.cat([GRID.encode_tiles(x[k : k + 1], w[k : k + 1]) for k in range(1000, 1060)])
    values = [GRID.decode_tiles(each).double() for each in (codes[1000:1060], alone)]
    errors = [(w[1000:1060] * (x[1000:1060] - each) ** 2).sum(1) for each in values]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-5, atol=1e-5)
    assert GRID.encode_tiles(x[:0]).shape == (0, 1)


def test_the_distortion_of_normal_weights() -> None:
    x = draw(6000, 8, seed=11, dtype=torch.float32)
    sizes = (0.9, HEADROOM * GRID.rms, 1.035, 1.1, 1.2)
    distortion = {s: ((x - GRID.decode_tiles(GRID.encode_tiles(s * x)) / s) ** 2).mean().item() for s in sizes}
    best = distortion[1.035]
    assert best == min(distortion.values())
    assert 0.085 < best <= 0.092
    assert distortion[HEADROOM * GRID.rms] < 1.02 * best
    W = x.reshape(100, 480)
    assert (W - rounded(W)).square().mean() / W.square().mean() == pytest.approx(distortion[HEADROOM * GRID.rms], rel=0.01)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (2, 9), (7, 172), (1, 4000)], ids=str)
def test_every_shape_is_rounded(shape: tuple[int, int]) -> None:
    W = draw(*shape, seed=12, dtype=torch.float32)
    W_hat = rounded(W, torch.ones_like(W))
    assert W_hat.shape == shape
    # Entries that fill up a tile weigh nothing, so that those which are left are no worse than in whole tiles.
    assert (W - W_hat).square().mean() < 0.2 * W.square().mean()
    assert GRID.stored_bits(shape, torch.bfloat16) == shape[0] * -(-shape[1] // 8) * 16 + 32
    GRID.check(*shape)


@pytest.mark.parametrize("size", [1e-44, 1e-38, 2.0**-99, 2.0**-20, 2.0**20, 2.0**99])
def test_size_does_not_matter(size: float) -> None:
    W = draw(6, 64, seed=13, dtype=torch.float32)
    W_hat = rounded(size * W)
    assert torch.isfinite(W_hat).all()
    if size >= 1e-30:
        torch.testing.assert_close(W_hat / size, rounded(W), rtol=1e-6, atol=0)
    else:
        assert W_hat.abs().max() < 1e-37


def test_a_weight_of_zeros_vanishes() -> None:
    assert rounded(torch.zeros(4, 24)).abs().max() < 1e-38


def test_outliers_are_clipped_and_the_rest_survives() -> None:
    x = draw(100, 8, seed=14, dtype=torch.float32)
    x[:, 3] = 1e6
    values = GRID.decode_tiles(GRID.encode_tiles(x))
    assert torch.isfinite(values).all()
    assert (values[:, 3] > 2).all()


def test_more_weight_means_less_error() -> None:
    x, w = draw(3000, 8, seed=15), torch.ones(3000, 8, dtype=torch.float64)
    w[:, 0] = 100
    plain, weighted = ((x - GRID.decode_tiles(GRID.encode_tiles(x, each))).square().mean(0) for each in (None, w))
    assert weighted[0] < 0.3 * plain[0]


def test_the_name_is_read_back() -> None:
    assert parse("lattice2") == GRID
    assert GRID.name == "lattice2"
    assert all(parse(name) is None for name in ("lattice", "lattice3", "lattice22", "int2-g8"))
    assert (GRID.bits, GRID.tile_bits(), GRID.tile(5, 9), GRID.rotates) == (2, 16, (1, 8), True)
