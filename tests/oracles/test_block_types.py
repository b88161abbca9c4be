"""Block types and their bytes against the `gguf` package: what it reads from our bytes is what our grids decode, bit by bit."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from laws.problems import draw
from roundel.formats.gguf_blocks import PACKERS
from roundel.grids import ScalarGrid, TileGrid, parse_scheme
from roundel.grids.codebooks import KINDS
from roundel.rounding import nearest

D_OUT, D_IN = 3, 512
TYPES = {name: GGMLQuantizationType[name.upper()] for name in PACKERS}
every_type = pytest.mark.parametrize("name", TYPES)


def scalar(name: str) -> ScalarGrid:
    grid = parse_scheme(name)
    assert isinstance(grid, ScalarGrid)
    return grid


def read(raw: torch.Tensor, name: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(raw.numpy(), TYPES[name]))


def integers(low: int, high: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Uniform on the whole range, the ends included at least once."""
    drawn = torch.randint(low, high + 1, (D_OUT, columns), generator=torch.Generator().manual_seed(low + columns))
    drawn[0, :2] = torch.tensor([low, high])
    return drawn.to(dtype)


def arbitrary_scales(name: str) -> dict[str, torch.Tensor]:
    """Any scales that the format can store, not only those that a fit would choose."""
    half = {key: draw(D_OUT, D_IN // 256, seed=ord(key[1:2] or "d")).to(torch.float16) for key in ("d", "dmin")}
    match name:
        case "q4_0" | "q5_0" | "q8_0" | "iq4_nl":
            return {"d": draw(D_OUT, D_IN // 32, seed=1).to(torch.float16)}
        case "mxfp4":
            return {"scale": integers(1, 252, D_IN // 32, torch.uint8)}
        case "q3_k" | "q6_k" | "iq4_xs":
            low, high = (-128, 127) if name == "q6_k" else (-32, 31)
            return {"d": half["d"], "sc": integers(low, high, D_IN // (32 if name == "iq4_xs" else 16), torch.int8)}
        case _ if name in KINDS:
            return {"d": half["d"], "sc": integers(0, 15, D_IN // KINDS[name].group, torch.uint8)}
        case _:
            columns, most = (D_IN // 16, 15) if name == "q2_k" else (D_IN // 32, 63)
            return {**half, "sc": integers(0, most, columns, torch.uint8), "m": integers(1, most, columns, torch.uint8)}


def arbitrary_codes(name: str) -> torch.Tensor:
    """Any codes that the format can store."""
    grid = parse_scheme(name)
    if isinstance(grid, TileGrid):
        values = grid.rms * draw(D_OUT * D_IN // grid.tile(D_OUT, D_IN)[1], grid.tile(D_OUT, D_IN)[1], seed=3)
        return grid.encode_tiles(values).unflatten(0, (D_OUT, -1))
    return integers(*scalar(name).code_range, D_IN, torch.int8)


@every_type
def test_gguf_reads_from_our_bytes_what_the_grid_decodes(name: str) -> None:
    grid, scales, codes = parse_scheme(name), arbitrary_scales(name), arbitrary_codes(name)
    raw = PACKERS[name](codes, scales)
    assert raw.shape == (D_OUT, gguf.quant_shape_to_byte_shape((D_OUT, D_IN), TYPES[name])[1])
    assert torch.equal(read(raw, name), grid.dequantize(codes, scales, (D_OUT, D_IN), torch.float32))


@every_type
def test_fitted_scales_pack_without_loss(name: str) -> None:
    grid, W = parse_scheme(name), draw(D_OUT, D_IN, seed=5, dtype=torch.float32)
    scales = grid.fit_scales(W, torch.ones(D_IN), torch.bfloat16)
    codes = nearest(W, grid, scales)
    assert torch.equal(read(PACKERS[name](codes, scales), name), grid.dequantize(codes, scales, (D_OUT, D_IN), torch.float32))


@every_type
def test_the_bytes_are_as_many_as_the_grid_says(name: str) -> None:
    packed = PACKERS[name](arbitrary_codes(name), arbitrary_scales(name))
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == parse_scheme(name).stored_bits((D_OUT, D_IN), torch.float32)


@pytest.mark.parametrize(("name", "gain"), [("q4_0", 0.9), ("q5_0", 0.95), ("q8_0", 1.0), ("mxfp4", 0.95)])
@pytest.mark.parametrize("weighted", [False, True])
def test_searched_scales_are_not_worse_than_those_of_gguf(name: str, gain: float, weighted: bool) -> None:
    """`gguf` takes the largest magnitude and sees no weights; it can quantize only these of the types."""
    grid, W = scalar(name), draw(64, D_IN, seed=6, dtype=torch.float32)
    weights = draw(D_IN, seed=7, dtype=torch.float32).square() if weighted else torch.ones(D_IN)
    scales = grid.fit_scales(W, weights, torch.float16)
    codes = grid.encode(W, *grid.affine(scales, W.shape, torch.float32))
    ours = (weights * (W - grid.dequantize(codes, scales, W.shape, torch.float32)).square()).sum()
    theirs = (weights * (W - read(torch.from_numpy(gguf.quantize(W.numpy(), TYPES[name])), name)).square()).sum()
    assert ours < gain * theirs


def test_the_levels_of_iq4_nl_and_e2m1_are_those_of_gguf() -> None:
    assert scalar("iq4_nl").levels == tuple(map(float, gguf.quants.IQ4_NL.kvalues))
    assert scalar("mxfp4").levels == tuple(np.unique(np.array(gguf.quants.MXFP4.kvalues) / 2).tolist())
