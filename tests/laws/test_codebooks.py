"""llama.cpp's codebooks: the coder against all codewords, and scales against those that a simple fit finds."""

import gguf
import pytest
import torch
from torch import Tensor

from laws.problems import draw
from roundel.errors import SchemeError
from roundel.grids import parse_scheme
from roundel.grids.base import spread
from roundel.grids.codebooks import KINDS, CodebookBlock
from roundel.recipes import Recipe
from roundel.rounding import nearest

every_kind = pytest.mark.parametrize("kind", KINDS)


def grid_of(kind: str) -> CodebookBlock:
    grid = parse_scheme(kind)
    assert isinstance(grid, CodebookBlock)
    return grid


def random_codes(kind: str, tiles: int, seed: int) -> Tensor:
    """Any that the format can store."""
    layout, generator = KINDS[kind], torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, layout.tables.grid_shape[0], (tiles, layout.entries), generator=generator)
    signs = torch.randint(0, 2, (tiles, layout.size), generator=generator)
    if layout.even:
        signs[:, -1] = signs[:, :-1].sum(1) % 2
    return torch.cat([numbers, (signs << torch.arange(layout.size)).sum(1, keepdim=True)], dim=1).to(torch.int16)


def least(kind: str, x: Tensor, w: Tensor) -> Tensor:
    """The smallest weighted squared distance of one tile to any codeword, from all numbers and signs."""
    grid, layout = grid_of(kind), KINDS[kind]
    numbers = torch.cartesian_prod(*[torch.arange(layout.tables.grid_shape[0])] * layout.entries).reshape(-1, layout.entries)
    codes = torch.cat([numbers, torch.zeros(len(numbers), 1, dtype=torch.long)], dim=1).to(torch.int16)
    magnitudes = grid.decode_tiles(codes).double()
    best = torch.tensor(torch.inf, dtype=torch.float64)
    for pattern in range(2**layout.size):
        signs = 1 - 2 * (pattern >> torch.arange(layout.size) & 1)
        if layout.even and signs.prod() < 0:
            continue
        best = torch.minimum(best, magnitudes.square() @ w + 2 * magnitudes @ (-w * x * signs) + (w * x * x).sum()).amin()
    return best


@every_kind
def test_every_code_is_coded_as_itself(kind: str) -> None:
    grid, codes = grid_of(kind), random_codes(kind, 3000, seed=0)
    assert torch.equal(grid.encode_tiles(grid.decode_tiles(codes)), codes)
    assert torch.equal(
        grid.encode_tiles(grid.decode_tiles(codes).double(), draw(*codes.shape[:1], grid.layout.size, seed=1).abs() + 0.01), codes
    )


@every_kind
def test_the_nearest_of_all_codewords_is_found(kind: str) -> None:
    grid, tiles = grid_of(kind), 4 if kind == "iq3_xxs" else 12
    x, w = grid.rms * draw(tiles, grid.layout.size, seed=2), draw(tiles, grid.layout.size, seed=3).square()
    w[0, 1:] = 0
    x[1] = 0
    codes = grid.encode_tiles(x, w)
    error = (w * (x - grid.decode_tiles(codes)).square()).sum(1)
    expected = torch.stack([least(kind, *pair) for pair in zip(x, w, strict=True)])
    torch.testing.assert_close(error, expected, rtol=1e-9, atol=1e-9 * grid.rms**2)


@every_kind
def test_signs_are_even_where_they_have_to_be(kind: str) -> None:
    grid = grid_of(kind)
    negative = (grid.decode_tiles(grid.encode_tiles(grid.rms * draw(500, grid.layout.size, seed=4))) < 0).sum(1) % 2
    assert bool(negative.any()) is not grid.layout.even


@every_kind
def test_bits_are_those_of_gguf(kind: str) -> None:
    grid = grid_of(kind)
    columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    assert columns == 256
    assert grid.stored_bits((3, 512), torch.bfloat16) == 3 * 2 * size * 8
    scales = 16 + 4 * columns // grid.layout.group
    assert grid.tile_bits() * columns // grid.layout.size + scales in (size * 8, size * 8 - 16)  # iq2_s and others have no spare bit


@every_kind
def test_scales_are_better_than_those_of_the_largest_weight(kind: str) -> None:
    """`d` and `sc` so that each group's largest weight is the codebook's, and the same with a common factor."""
    grid, W, weights = grid_of(kind), 0.05 * draw(16, 512, seed=5, dtype=torch.float32), draw(512, seed=6, dtype=torch.float32).square()

    def error(scales: dict[str, Tensor]) -> float:
        steps = grid.steps(scales, (16, 512), torch.float32).reshape(-1, 1)
        codes = grid.encode_tiles(grid.to_tiles(W) / steps, grid.to_tiles(weights.expand_as(W))).unflatten(0, (16, -1))
        return (weights * (W - grid.dequantize(codes, scales, (16, 512), torch.float32)).square()).sum().item()

    top = grid.decode_tiles(random_codes(kind, 5000, seed=7)).max()
    wanted = W.unflatten(1, (-1, grid.layout.group)).abs().amax(2) / top / grid.layout.unit
    simple = []
    for factor in (0.6, 0.7, 0.8, 0.9, 1.0):
        d = (factor * wanted.unflatten(1, (2, -1)).amax(2) / 31).half()
        sc = ((factor * wanted / spread(d.float(), (16, wanted.shape[1])) - 1) / 2).round().clamp(0, 15).to(torch.uint8)
        simple.append(error({"d": d, "sc": sc}))
    assert error(grid.fit_scales(W, weights, torch.bfloat16)) < 0.98 * min(simple)


@every_kind
def test_scales_are_always_usable(kind: str) -> None:
    grid, normal = grid_of(kind), draw(1, 256, seed=8, dtype=torch.float32)
    W = torch.cat([torch.zeros(1, 256), torch.full((1, 256), -0.7), *(size * normal for size in (1e-38, 1e-6, 1.0, 1e4, 1e8, 1e30))])
    for weights in (torch.ones(256), torch.zeros(256), torch.arange(256) * 1e30):
        scales = grid.fit_scales(W, weights, torch.bfloat16)
        assert {name: each.dtype for name, each in scales.items()} == {"d": torch.float16, "sc": torch.uint8}
        assert scales["d"].isfinite().all()
        assert (scales["d"] > 0).all()
        W_hat = grid.dequantize(nearest(W, grid, scales), scales, (8, 256), torch.float32)
        assert W_hat.isfinite().all()
        assert W_hat[0].abs().max() < 1e-6  # none has a zero: what is nearest is the least scale
    wanted = torch.tensor([[0.0, -1.0, 1e-30, 1e30, 0.3]])
    stored = grid.stored("d", wanted, torch.ones(1, 5, dtype=torch.float16))
    assert stored.tolist() == [[1, 1, 2.0**-24, 65504, torch.tensor(0.3).half().item()]]


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(SchemeError, match="groups of 256 do not divide the width 96; try iq4_nl"):
        grid_of("iq3_xxs").check(4, 96)
    with pytest.raises(SchemeError, match="try int3-channel"):
        grid_of("iq3_xxs").check(4, 90)


def test_tuning_is_refused_at_once() -> None:
    with pytest.raises(SchemeError, match="--tune blocks: iq3_xxs cannot be tuned; use --tune none"):
        Recipe(scheme="iq3_xxs", format="gguf", tune="blocks")
    assert Recipe(scheme="iq3_xxs").written_format() == "gguf"
