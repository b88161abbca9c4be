"""Packed linears on a GPU against their dense weights: few rows by the kernel that decodes and multiplies, many by decoding first."""

import pytest
import torch

from laws.problems import draw
from roundel.formats.native import Layout, Native
from roundel.grids import ScalarGrid, parse_scheme
from roundel.integration.linear import QuantizedLinear
from roundel.rotation import Rotation
from roundel.rounding.round import dequantized
from roundel.types import RoundedWeight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def nearest(scheme: str, shape: tuple[int, int], rotation: str | None) -> RoundedWeight:
    grid, W = parse_scheme(scheme), draw(*shape, seed=1).float()
    scales = grid.fit_scales(W, torch.ones(shape[1]), torch.bfloat16)
    if isinstance(grid, ScalarGrid):
        codes = grid.encode(W, *grid.affine(scales, shape, torch.float32))
    else:
        rows, columns = grid.tile(*shape)
        codes = grid.encode_tiles(grid.to_tiles(W) / scales["scale"]).unflatten(0, (-(-shape[0] // rows), -(-shape[1] // columns)))
    drawn = None if rotation is None else Rotation.draw(*shape, kind=rotation, seed=2)
    return RoundedWeight(scheme=scheme, codes=codes, scales=scales, shape=shape, rotation=drawn)


@pytest.mark.parametrize("rows", [1, 5, 16, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g64-asym", "int2-channel", "int8-tensor", "nvfp4", "q4_0", "lattice2"])
def test_products_are_those_of_the_dense_weight(scheme: str, dtype: torch.dtype, rows: int) -> None:
    check(nearest(scheme, (160, 192), None), dtype, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rotation", [None, "hadamard"])
@pytest.mark.parametrize("scheme", ["trellis2", "trellis3-hyb", "trellis4-3inst", "trellis2-1mad", "trellis1-mcg-s12"])
def test_products_of_trellises(scheme: str, rotation: str | None, dtype: torch.dtype) -> None:
    weight = nearest(scheme, (64, 96), rotation)
    for rows in (1, 16, 17):
        check(weight, dtype, rows)


def check(weight: RoundedWeight, dtype: torch.dtype, rows: int) -> None:
    packed = Native().pack(weight)
    layout = Layout.of(packed, parse_scheme(weight.scheme), weight.shape)
    module = QuantizedLinear(layout, tensors=packed).cuda()
    x = draw(rows, weight.shape[1], seed=3).to(dtype).cuda()
    with torch.no_grad():
        y = module(x)
    assert y.dtype == dtype
    expected = x.double() @ dequantized(weight).double().cuda().T
    tolerance = {torch.float32: 3e-3, torch.float16: 6e-3, torch.bfloat16: 3e-2}[dtype]  # of float32 the kernel may take TF32 products
    assert (y.double() - expected).abs().max() < tolerance * expected.abs().max()
