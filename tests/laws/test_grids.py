"""One conformance suite for every scalar grid."""

import itertools
import math

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laws.problems import draw
from roundel.errors import SchemeError
from roundel.grids import ScalarGrid, Scales, parse_scheme, search
from roundel.grids.base import gather, spread
from roundel.grids.uniform import Uniform

D_IN = 256
SYMMETRIC = [*(f"int{bits}-g32" for bits in range(2, 9)), "int2-g4", "int4-channel", "int8-channel", "int3-tensor", "int8-tensor"]
ASYMMETRIC = ["int2-g32-asym", "int3-g4-asym", "int4-g32-asym", "int4-channel-asym", "int8-channel-asym"]
AFFINE = ["int2-g32-affine", "int4-g32-affine", "int8-g4-affine"]
FLOATS = ["fp8", "fp8-tensor", "mxfp4", "nvfp4"]
SINGLE = ["q4_0", "q5_0", "q8_0", "iq4_nl"]
WITH_MINIMA = ["q2_k", "q4_k", "q5_k"]
SUPER = ["q3_k", "q6_k", "iq4_xs", *WITH_MINIMA]
BLOCKS = [*SINGLE, *SUPER]
FREE = [*SYMMETRIC, *ASYMMETRIC, *AFFINE, *FLOATS]
"""Families that store weights of any size; float16 limits the others."""
NAMES = [*FREE, *BLOCKS]
SOME = ["int2-g32", "int4-channel", "int8-tensor", "int3-g32-asym", "int8-channel-asym", "int4-g32-affine", *FLOATS, *BLOCKS]
seeds = st.integers(0, 10_000)


def scalar(name: str) -> ScalarGrid:
    grid = parse_scheme(name)
    assert isinstance(grid, ScalarGrid)
    return grid


every_grid = pytest.mark.parametrize("name", NAMES)
every_scale_type = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product([*SYMMETRIC, *ASYMMETRIC, *AFFINE, "fp8", "fp8-tensor"], (torch.float16, torch.bfloat16, torch.float32)),
        *((name, torch.bfloat16) for name in ("mxfp4", "nvfp4", *BLOCKS)),  # scales of their own types
    ],
    ids=str,
)
some_grids = pytest.mark.parametrize("name", SOME)


def all_codes(grid: ScalarGrid) -> Tensor:
    low, high = grid.code_range
    return torch.arange(low, high + 1).to(torch.int8)


def fitted(grid: ScalarGrid, W: Tensor, weights: Tensor | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return grid.fit_scales(W, torch.ones(W.shape[1], dtype=W.dtype) if weights is None else weights, dtype)


def rounded(grid: ScalarGrid, W: Tensor, scales: Scales) -> Tensor:
    shape = (W.shape[0], W.shape[1])
    return grid.dequantize(grid.encode(W, *grid.affine(scales, shape, W.dtype)), scales, shape, W.dtype)


def reconstructed(grid: ScalarGrid, W: Tensor, weights: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    return rounded(grid, W, fitted(grid, W, weights, dtype))


def error(W: Tensor, W_hat: Tensor, weights: Tensor | float = 1.0) -> float:
    return ((W - W_hat).double().square() * weights).sum().item()


# --- codes and levels


@every_grid
def test_the_name_is_read_back(name: str) -> None:
    grid = scalar(name)
    assert grid.name == name
    assert parse_scheme(grid.name) == grid
    assert hash(parse_scheme(grid.name)) == hash(grid)


@every_grid
def test_the_codes_are_as_many_as_the_bits_can_hold(name: str) -> None:
    """Some floating-point formats have two zeros and NaN; -128 of `q8_0` is never written."""
    grid = scalar(name)
    assert len(all_codes(grid)) == {"fp8": 253, "fp8-tensor": 253, "mxfp4": 15, "nvfp4": 15, "q8_0": 255}.get(name, 2**grid.bits)
    if grid.levels is not None:
        assert len(grid.levels) == len(all_codes(grid))
        assert list(grid.levels) == sorted(set(grid.levels))


def test_the_levels_of_fp8_are_the_finite_numbers_of_e4m3fn() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert scalar("fp8").levels == tuple(values[values.isfinite()].unique().tolist())


@every_grid
@given(mantissa=st.floats(1, 2), exponent=st.integers(-100, 100), negative=st.booleans(), shift=st.floats(-20, 20))
@settings(max_examples=5, deadline=None)
def test_encode_inverts_decode(name: str, mantissa: float, exponent: int, negative: bool, shift: float) -> None:
    grid = scalar(name)
    codes = all_codes(grid)
    step = torch.full(codes.shape, (-1 if negative else 1) * mantissa * 2.0**exponent)
    assert torch.equal(grid.encode(grid.decode(codes, step), step), codes)
    assert torch.equal(grid.encode(grid.decode(codes, step, shift * step), step, shift * step), codes)


@every_grid
@given(seed=seeds, negative=st.booleans(), shift=st.sampled_from([None, 0.3, -2.0]))
@settings(max_examples=3, deadline=None)
def test_encode_finds_the_nearest_of_all_codes(name: str, seed: int, negative: bool, shift: float | None) -> None:
    grid = scalar(name)
    values = 3 * draw(50, seed=seed)
    most = max(map(abs, grid.levels or grid.code_range))
    step = torch.full((50,), (-1 if negative else 1) * 3.0 / most, dtype=torch.float64)
    offset = None if shift is None else torch.full_like(step, shift)
    codes = grid.encode(values, step, offset)
    assert codes.dtype == torch.int8
    distance = (values - grid.decode(codes, step, offset)).abs()
    every = all_codes(grid)
    representable = grid.decode(every, step[:1].expand(len(every)), None if offset is None else offset[:1].expand(len(every)))
    torch.testing.assert_close(distance, (values[:, None] - representable).abs().amin(1), rtol=1e-12, atol=1e-12)


@every_grid
@given(seed=seeds)
@settings(max_examples=3, deadline=None)
def test_rounding_twice_is_rounding_once(name: str, seed: int) -> None:
    grid = scalar(name)
    values, step, offset = (draw(40, seed=seed + k, dtype=torch.float32) for k in range(3))
    once = grid.decode(grid.encode(values, step, offset), step, offset)
    assert torch.equal(grid.decode(grid.encode(once, step, offset), step, offset), once)


def test_a_step_of_zero_has_a_code() -> None:
    for name in SOME:
        codes = scalar(name).encode(torch.tensor([0.0, 1.0, -1.0]), torch.zeros(3), torch.tensor([0.0, 2.0, 0.0]))
        assert codes.dtype == torch.int8


# --- what is stored


@every_grid
def test_stored_bits_count_codes_and_scales_exactly(name: str) -> None:
    grid, shape = scalar(name), (3, D_IN)
    for dtype in (torch.bfloat16, torch.float32):
        scales = fitted(grid, draw(*shape, seed=1, dtype=torch.float32), dtype=dtype)
        if name in BLOCKS:
            columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
            expected = 3 * (D_IN // columns) * size * 8
        else:
            # a zero point is packed like a code
            expected = 3 * D_IN * grid.bits + sum(
                each.numel() * (grid.bits if key == "zero_point" else each.dtype.itemsize * 8) for key, each in scales.items()
            )
        assert grid.stored_bits(shape, dtype) == expected


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4-g128", 4.125),
        ("int4-g128-asym", 4.15625),
        ("int3-channel-asym", 3 + 19 / 256),
        ("int4-tensor", 4 + 16 / 1024),
        ("fp8", 8 + 16 / 256),
        ("fp8-tensor", 8 + 16 / 1024),
        ("mxfp4", 4.25),
        ("nvfp4", 4.5 + 32 / 1024),
        ("q4_0", 4.5),
        ("q5_0", 5.5),
        ("q8_0", 8.5),
        ("iq4_xs", 4.25),
        ("iq4_nl", 4.5),
        ("q2_k", 2.625),
        ("q3_k", 3.4375),
        ("q4_k", 4.5),
        ("q5_k", 5.5),
        ("q6_k", 6.5625),
    ],
)
def test_bits_per_weight_are_those_of_the_formats(name: str, bits: float) -> None:
    assert scalar(name).stored_bits((4, 256), torch.bfloat16) / 1024 == bits


@every_grid
def test_scales_are_named_tensors_that_divide_the_weight(name: str) -> None:
    grid = scalar(name)
    scales = fitted(grid, draw(6, 2 * D_IN, seed=2, dtype=torch.float32), dtype=torch.bfloat16)
    for each in scales.values():
        assert each.ndim == 2
        assert 6 % each.shape[0] == 0
        assert 2 * D_IN % each.shape[1] == 0
    free = {"scale", "bias"} if name in {*SYMMETRIC, *ASYMMETRIC, *AFFINE, "fp8", "fp8-tensor"} else set()
    for key, each in scales.items():
        assert (each.dtype == torch.bfloat16) == (key in free)


@some_grids
def test_fitting_rows_in_chunks_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, W = scalar(name), draw(3, D_IN, seed=3, dtype=torch.float32)
    W[1] *= 3
    weights = draw(D_IN, seed=4, dtype=torch.float32).abs()
    together = fitted(grid, W, weights)
    monkeypatch.setitem(search.CHUNK, "cpu", 2 * D_IN)
    for key, each in fitted(grid, W, weights).items():
        torch.testing.assert_close(each.float(), together[key].float(), rtol=1e-6, atol=0)


@every_grid
def test_dequantize_is_decode_of_steps_and_offsets(name: str) -> None:
    grid, W = scalar(name), draw(3, D_IN, seed=5)
    scales = fitted(grid, W)
    step, offset = grid.affine(scales, (3, D_IN), torch.float64)
    codes = grid.encode(W, step, offset)
    assert step.shape == W.shape
    torch.testing.assert_close(
        grid.dequantize(codes, scales, (3, D_IN), torch.float64), grid.decode(codes, step, offset), rtol=1e-12, atol=1e-12
    )


@every_grid
def test_the_weight_is_linear_in_the_scales_of_its_parts(name: str) -> None:
    grid, W, shape = scalar(name), draw(3, D_IN, seed=6), (3, D_IN)
    scales = fitted(grid, W)
    codes = grid.encode(W, *grid.affine(scales, shape, W.dtype))
    parts = grid.parts(codes, scales, shape, torch.float64)
    assert set(parts) <= set(scales)
    if name == "mxfp4":
        assert parts == {}
        return
    total = sum(spread(scales[key].double(), shape) * part for key, part in parts.items())
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total, grid.dequantize(codes, scales, shape, torch.float64), rtol=1e-12, atol=1e-12)


@every_scale_type
def test_any_wanted_scale_has_a_stored_form(name: str, dtype: torch.dtype) -> None:
    grid, W, shape = scalar(name), draw(12, D_IN, seed=7), (12, D_IN)
    scales = fitted(grid, W, dtype=dtype)
    codes = grid.encode(W, *grid.affine(scales, shape, W.dtype))
    for key in grid.parts(codes, scales, shape, torch.float64):
        like = scales[key]
        assert torch.equal(grid.stored(key, like.double(), like).double(), like.double())
        wanted = like.double()
        extreme = torch.tensor([0.0, -0.0, 1e-300, -1e-300, 1e-30, -1e-30, 1e30, -1e30, 1e300, -1e300, 1.0, -1.0], dtype=torch.float64)
        wanted[:, 0] = extreme[: wanted.shape[0]]
        stored = grid.stored(key, wanted, like)
        assert stored.dtype == like.dtype
        assert stored.shape == like.shape
        assert stored.float().isfinite().all()
        assert key == "bias" or (stored.float() != 0).all()
        if name in {*ASYMMETRIC, *FLOATS}:
            assert (stored.float() > 0).all()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "q4_0", "q4_k", "int4-g32"])
def test_the_stored_form_is_the_nearest(name: str) -> None:
    grid = scalar(name)
    like = next(iter(fitted(grid, draw(1, D_IN, seed=8, dtype=torch.float32), dtype=torch.float16).values()))
    key = "d" if name.startswith("q") else "scale"
    if name == "mxfp4":
        found = grid.stored(key, torch.tensor([[0.26, 4.0, 5.5, 1e-40, -1.0]]), torch.full((1, 5), 77, dtype=torch.uint8))
        assert found.tolist() == [[125, 129, 129, 1, 77]]
        return
    every = torch.arange(256 if name == "nvfp4" else 65536, dtype=torch.int32).to(torch.uint8 if name == "nvfp4" else torch.int32)
    every = every.view(torch.float8_e4m3fn) if name == "nvfp4" else every.to(torch.uint16).view(torch.float16)
    every = every.double()[every.double().isfinite()]
    wanted = draw(1, 64, seed=9).abs() * 10
    found = grid.stored(key, wanted, like[:, :1].expand(1, 64)).double()
    torch.testing.assert_close((found - wanted).abs()[0], (every[None] - wanted[0][:, None]).abs().amin(1), rtol=1e-3, atol=1e-7)


@every_scale_type
def test_scales_are_always_usable(name: str, dtype: torch.dtype) -> None:
    grid, normal = scalar(name), draw(1, D_IN, seed=1, dtype=torch.float32)
    rows = [
        torch.zeros(1, D_IN),
        torch.full((1, D_IN), 0.7),
        torch.full((1, D_IN), -0.7),
        *(size * normal for size in (1e-44, 1e-38, 1e-30, 1e-6, 1.0, 1e4, 1e6, 1e30)),
        torch.nn.functional.one_hot(torch.tensor([5]), D_IN).float(),
        torch.cat([normal[:, : D_IN // 2], torch.zeros(1, D_IN // 2)], dim=1),
    ]
    together = torch.cat(rows)
    for W in (together, torch.zeros(2, D_IN)):
        for weights in (torch.ones(D_IN), torch.zeros(D_IN)) if W is together else (torch.arange(D_IN) * 1e30,):
            scales = fitted(grid, W, weights, dtype)
            for key, each in scales.items():
                if each.is_floating_point():
                    assert each.float().isfinite().all()
                    assert key == "bias" or (each.float() != 0).all()
                    assert name not in {*ASYMMETRIC, *FLOATS} or (each.float() > 0).all()
            assert (grid.affine(scales, (W.shape[0], D_IN), torch.float32)[0] != 0).all()
            W_hat = rounded(grid, W, scales)
            assert W_hat.isfinite().all()
            # iq4_nl has no zero: what is nearest is the least scale
            assert W_hat[0].abs().max() <= (6e-8 * 32 if name == "iq4_xs" else 6e-8 if name == "iq4_nl" else 0)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("size", [1e8, 1e30])
def test_weights_beyond_float16_are_clamped_with_their_sign(name: str, size: float) -> None:
    W = size * draw(2, D_IN, seed=3, dtype=torch.float32).sign()
    W_hat = reconstructed(scalar(name), W)
    assert torch.equal(W_hat.sign(), W.sign())
    assert (W_hat.abs() > 65504 * 2).all()


# --- how good the scales are


@every_grid
@pytest.mark.parametrize("value", [0.7, -0.7, 1e4])
def test_a_constant_row_is_kept(name: str, value: float) -> None:
    grid, W = scalar(name), torch.full((2, D_IN), value)
    # what the scale's own format can hold, times e2m1 where that helps
    tolerance = 0.21 if name == "mxfp4" else 0.04 if name == "nvfp4" else 2**-10 if name in BLOCKS else 1e-6
    torch.testing.assert_close(reconstructed(grid, W), W, rtol=tolerance, atol=0)
    torch.testing.assert_close(reconstructed(grid, W, dtype=torch.bfloat16), W, rtol=max(tolerance, 2**-8), atol=0)


@every_grid
@pytest.mark.parametrize("power", [-20, 3, 20])
def test_the_grid_grows_with_the_weights(name: str, power: int) -> None:
    if name in BLOCKS:
        power = min(max(power, 0), 3)  # their float16 scales become subnormal
    grid, W, weights = scalar(name), 4 * draw(3, D_IN, seed=100, dtype=torch.float32), draw(D_IN, seed=7, dtype=torch.float32).abs()
    torch.testing.assert_close(
        reconstructed(grid, 2.0**power * W, weights) / 2.0**power, reconstructed(grid, W, weights), rtol=1e-5, atol=1e-9
    )


@some_grids
@pytest.mark.parametrize(
    ("unusual", "dtype"), [(1e30, torch.bfloat16), (1e-30, torch.bfloat16), (1e4, torch.float16), (1e-3, torch.float16)], ids=str
)
def test_huge_and_tiny_weights_are_rounded_as_well_as_ordinary_ones(name: str, unusual: float, dtype: torch.dtype) -> None:
    """The sums of squares that compare two scales must neither overflow nor vanish; models in float16 have weights of 0.001."""
    grid, W = scalar(name), draw(8, D_IN, seed=4, dtype=torch.float32)
    if name in BLOCKS:
        unusual = min(max(unusual, 1e-3), 1e4)
    errors = [error(W, reconstructed(grid, size * W, dtype=dtype) / size) for size in (1.0, unusual)]
    assert errors[1] < 1.2 * errors[0]


def on_the_grid(grid: ScalarGrid, seed: int) -> Tensor:
    """Weights that the grid can represent, with scales as different as those of ordinary weights."""
    pattern = draw(4, D_IN, seed=seed)
    scales = fitted(grid, pattern, dtype=torch.float64)
    low, high = grid.code_range
    codes = torch.randint(low, high + 1, (4, D_IN), generator=torch.Generator().manual_seed(seed))
    codes[:, ::16], codes[:, 1::16] = low, high
    return grid.dequantize(codes.to(torch.int8), scales, (4, D_IN), torch.float64)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        *((f"int{bits}-g32", 1e-12) for bits in range(2, 7)),
        *((name, 1e-12) for name in ("int3-g32-asym", "int4-channel-asym", "fp8", "mxfp4", "q4_0", "q5_0", "q8_0", "iq4_nl")),
        # two levels of scales are found well, but not exactly
        *(("nvfp4", 2e-3), ("q2_k", 1e-3), ("q3_k", 1e-4), ("q4_k", 1e-4), ("q5_k", 1e-4), ("q6_k", 1e-4), ("iq4_xs", 1e-4)),
    ],
)
@given(seed=seeds)
@settings(max_examples=3, deadline=None)
def test_weights_on_the_grid_are_found(name: str, tolerance: float, seed: int) -> None:
    grid = scalar(name)
    W = on_the_grid(grid, seed)
    assert error(W, reconstructed(grid, W, dtype=torch.float64)) < tolerance * W.square().sum().item()


def absmax(name: str, W: Tensor) -> dict[str, Tensor]:  # noqa: PLR0911
    """Scales by the largest magnitude, or the range, of each group and block: the usual rounding to nearest."""
    grid = scalar(name)
    low, high = grid.code_range

    def over(columns: int) -> Tensor:
        return W.unflatten(1, (-1, columns))

    if name.endswith("-asym"):
        group = D_IN if "channel" in name else 32
        bottom, top = over(group).amin(-1).clamp(max=0), over(group).amax(-1).clamp(min=0)
        scale = (top - bottom) / (high - low)
        return {"scale": scale, "zero_point": (low - bottom / scale).round().clamp(low, high).to(torch.int8)}
    if name.endswith("-affine"):
        bottom, top = over(32).amin(-1), over(32).amax(-1)
        return {"scale": (top - bottom) / (high - low), "bias": bottom}
    if name.startswith("int"):
        return {"scale": (over(32) if "g32" in name else over(D_IN)).abs().amax(-1) / high}
    match name:
        case "fp8":
            return {"scale": W.abs().amax(1, keepdim=True) / 448}
        case "mxfp4":
            return {"scale": (over(32).abs().amax(-1).log2().floor() - 2 + 127).to(torch.uint8)}
        case "nvfp4":
            tensor_scale = (W.abs().amax() / (6 * 448)).reshape(1, 1)
            return {"tensor_scale": tensor_scale, "scale": (over(16).abs().amax(-1) / 6 / tensor_scale).to(torch.float8_e4m3fn)}
        case "q4_0" | "q5_0" | "q8_0" | "iq4_nl":
            largest = over(32).gather(2, over(32).abs().argmax(-1, keepdim=True))[..., 0]
            return {"d": (largest / {"q4_0": -8, "q5_0": -16, "q8_0": 127, "iq4_nl": -127}[name]).half()}
        case "q3_k" | "q6_k" | "iq4_xs":
            group = grid.grouped(W).shape[-1]
            largest = over(group).gather(2, over(group).abs().argmax(-1, keepdim=True))[..., 0] / (grid.levels or (low,))[0]
            most = 127 if name == "q6_k" else 31
            d = (largest.unflatten(1, (-1, 256 // group)).abs().amax(-1) / most).half()
            return {"d": d, "sc": (largest / spread(d.float(), (len(W), largest.shape[1]))).round().clamp(-most, most).to(torch.int8)}
        case _:
            group, most = (16, 15) if name == "q2_k" else (32, 63)
            bottom, top = -over(group).amin(-1).clamp(max=0), over(group).amax(-1)
            scale = (top + bottom) / high
            d, dmin = ((each.unflatten(1, (-1, 256 // group)).amax(-1) / most).half() for each in (scale, bottom))
            of = [
                (each / spread(unit.float(), (len(W), each.shape[1]))).round().clamp(0, most).to(torch.uint8)
                for each, unit in ((scale, d), (bottom, dmin))
            ]
            return {"d": d, "dmin": dmin, "sc": of[0], "m": of[1]}


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("int2-g32", 0.5),
        ("int3-g32", 0.75),
        ("int4-g32", 0.85),
        ("int4-channel", 0.85),
        ("int2-g32-asym", 0.7),
        ("int3-g32-asym", 0.9),
        ("int4-g32-asym", 0.95),
        ("int2-channel-asym", 0.5),
        ("int2-g32-affine", 0.8),
        ("int4-g32-affine", 0.95),
        ("fp8", 0.98),
        ("mxfp4", 0.96),
        ("nvfp4", 0.8),
        ("q4_0", 0.9),
        ("q8_0", 1.0),
        ("q5_0", 0.95),
        ("iq4_nl", 0.85),
        ("iq4_xs", 0.85),
        ("q2_k", 0.7),
        ("q3_k", 0.88),
        ("q4_k", 0.85),
        ("q5_k", 0.9),
        ("q6_k", 0.9),
    ],
)
def test_searched_scales_beat_absmax(name: str, factor: float) -> None:
    grid, W = scalar(name), draw(64, D_IN, seed=9, dtype=torch.float32)
    ours, usual = error(W, reconstructed(grid, W, dtype=torch.float16)), error(W, rounded(grid, W, absmax(name, W)))
    assert ours < factor * usual


def scanned(name: str, W: Tensor, weights: Tensor) -> float:
    """The least error of scales found by brute force."""
    grid = scalar(name)
    low, high = grid.code_range
    group = {"mxfp4": 32, "nvfp4": 16}.get(name, 32)
    x, w = W.unflatten(1, (-1, group)).unsqueeze(-2), weights.unflatten(0, (-1, 1, group))
    size = x.abs().amax(-1, keepdim=True)
    offset: Tensor | None = None
    if name == "mxfp4":
        steps = 2.0 ** torch.arange(-30, 30, dtype=torch.float64)[:, None]
    elif name == "nvfp4":
        steps = (
            torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()[:, None]
            * fitted(grid, W, weights)["tensor_scale"].double()
        )
    elif name.endswith("-affine"):
        sizes, places = torch.linspace(0.3, 1.2, 120, dtype=torch.float64), torch.linspace(-0.3, 0.5, 160, dtype=torch.float64)
        width = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
        steps = sizes.repeat_interleave(160)[:, None] * width / (high - low)
        offset = x.amin(-1, keepdim=True) + places.repeat(120)[:, None] * width - low * steps
    elif name.endswith("-asym"):
        zeros = torch.arange(low, high + 1, dtype=torch.float64).repeat_interleave(200)[:, None]
        steps = torch.linspace(0.2, 2.2, 200, dtype=torch.float64).repeat(high - low + 1)[:, None] * size / (high - low)
        offset = -zeros * steps
    else:
        most = max(map(abs, grid.levels or grid.code_range))
        line = torch.linspace(0.3, 1.3, 1500, dtype=torch.float64)
        steps = torch.cat([line, -line])[:, None] * size / most
    shape = torch.broadcast_shapes(x.shape, steps.shape)
    step, shift = steps.expand(shape), None if offset is None else offset.expand(shape)
    values = grid.decode(grid.encode(x.expand(shape), step, shift), step, shift)
    return (w * (x - values).square()).sum(-1).amin(-1).sum().item()


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("int2-g32", 1.01),
        ("int4-g32", 1.01),
        ("int2-g32-asym", 1.01),
        ("int4-g32-asym", 1.03),
        ("int2-g32-affine", 1.01),
        ("int4-g32-affine", 1.03),
        ("mxfp4", 1.0),
        ("nvfp4", 1.0),
        ("q4_0", 1.02),
        ("q5_0", 1.03),
        ("iq4_nl", 1.02),
        ("q8_0", 1.05),
    ],
)
def test_the_search_is_about_as_good_as_brute_force(name: str, factor: float) -> None:
    W, weights = draw(4, 64, seed=10), 0.1 + draw(64, seed=11).square()
    found = error(W, reconstructed(scalar(name), W, weights, torch.float32), weights)
    assert found <= factor * scanned(name, W, weights) * (1 + 1e-6)


@pytest.mark.parametrize("name", SUPER)
def test_no_other_steps_of_a_superblock_are_much_better(name: str) -> None:
    """Given `d` and `dmin`, every `sc` and `m` of each group."""
    grid, W, weights = scalar(name), draw(2, D_IN, seed=12), 0.1 + draw(D_IN, seed=13).square()
    scales = fitted(grid, W, weights)
    columns = D_IN // scales["sc"].shape[1]
    x, w = W.unflatten(1, (-1, columns)), weights.unflatten(0, (-1, columns))
    low, high = {"q2_k": (1, 15), "q3_k": (-32, 31), "iq4_xs": (-32, 31), "q6_k": (-128, 127)}.get(name, (1, 63))
    m = torch.arange(high + 1 if name in WITH_MINIMA else 1)[:, None, None, None]
    offset = -m * scales.get("dmin", scales["d"]).double()[:, :, None]
    best = torch.full(x.shape[:2], math.inf, dtype=torch.float64)
    for sc in range(low, high + 1):
        shape = (len(m), *x.shape)
        step, shift = (scales["d"].double()[:, :, None] * sc).expand(shape), offset.expand(shape)
        values = grid.decode(grid.encode(x.expand(shape), step, shift), step, shift)
        best = torch.minimum(best, (w * (x - values).square()).sum(-1).amin(0))
    found = error(W, rounded(grid, W, scales), weights)
    assert found <= 1.1 * best.sum().item()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_scales_sign_follows_the_longer_tail(bits: int) -> None:
    grid = scalar(f"int{bits}-channel")
    low, _ = grid.code_range
    W = torch.arange(D_IN).float()[None] / D_IN * -low
    assert fitted(grid, W)["scale"].item() < 0
    assert fitted(grid, -W)["scale"].item() > 0


@pytest.mark.parametrize(
    ("skewed", "symmetric", "factor"),
    [
        ("int4-g32-asym", "int4-g32", 0.5),
        ("int4-g32-affine", "int4-g32-asym", 0.99),
        ("int2-g32-asym", "int2-g32", 0.7),
        ("int8-channel-asym", "int8-channel", 0.5),
        ("q4_k", "q4_0", 0.5),
    ],
)
def test_zero_points_and_minima_help_where_weights_are_skewed(skewed: str, symmetric: str, factor: float) -> None:
    W = draw(16, D_IN, seed=14, dtype=torch.float32).abs() - 0.3
    W[::2] *= -1
    assert error(W, reconstructed(scalar(skewed), W)) < factor * error(W, reconstructed(scalar(symmetric), W))


@some_grids
def test_columns_with_more_weight_are_rounded_better(name: str) -> None:
    grid, W = scalar(name), draw(60, D_IN, seed=2, dtype=torch.float32)
    weights = torch.ones(D_IN)
    weights[::8] = 100
    errors = [error(W, reconstructed(grid, W, column), weights) for column in (torch.ones(D_IN), weights)]
    assert errors[1] < errors[0]


def test_refitted_scales_are_a_minimum_where_they_are_free() -> None:
    """The closed form of the fit and the derivatives of `parts` agree."""
    for name in ("int4-g32", "int3-g32-asym", "fp8", "q4_0", "iq4_nl"):
        grid, W, shape = scalar(name), draw(3, D_IN, seed=15), (3, D_IN)
        scales = fitted(grid, W, dtype=torch.float64)
        codes = grid.encode(W, *grid.affine(scales, shape, W.dtype))
        ((key, part),) = grid.parts(codes, scales, shape, W.dtype).items()
        best = gather(W * part, *scales[key].shape) / gather(part * part, *scales[key].shape)
        torch.testing.assert_close(scales[key].double(), best, rtol=0.02, atol=0)


# --- refusals


@pytest.mark.parametrize(
    "name",
    [
        *("", "int4", "int", "int4-", "int4-g", "int4-g0", "int4-g-8", "int4g128", "INT4-g128", "int1-g128", "int9-channel", "int0-g8"),
        *(
            "fp4-g16",
            "int4-tensor-asym",
            "int4-g0-asym",
            "int9-g32-asym",
            "int4-asym",
            "int4-channel-affine",
            "int4-g0-affine",
            "int9-g32-affine",
            "fp8-g32",
            "mxfp8",
            "mxfp4-g32",
            "nvfp4-g16",
        ),
        *("q4_1", "q4", "Q4_K", "q4_k_m", "q7_k"),
    ],
)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(SchemeError):
        parse_scheme(name)


def test_fp8_has_two_names() -> None:
    assert parse_scheme("fp8-channel") == parse_scheme("fp8")


@pytest.mark.parametrize(
    ("name", "width", "reason", "alternative"),
    [
        ("int4-g32", 100, "group size 32 does not divide the width 100", "int4-g4 or -channel"),
        ("int4-g32", 70, "group size 32 does not divide the width 70", "int4-channel"),
        ("int4-g32-asym", 100, "groups of 32 do not divide the width 100", "int4-g4-asym or int4-channel-asym"),
        ("int4-g32-affine", 100, "groups of 32 do not divide the width 100", "int4-g4-affine or int4-channel-asym"),
        ("mxfp4", 48, "groups of 32 do not divide the width 48", "nvfp4 or int4-g16"),
        ("nvfp4", 24, "groups of 16 do not divide the width 24", "int4-g8 or int4-channel"),
        ("q4_k", 96, "groups of 256 do not divide the width 96", "q4_0 or q5_0 or iq4_nl or q8_0"),
        ("q6_k", 24, "groups of 256 do not divide the width 24", "int6-g8 or int6-channel"),
        ("q8_0", 17, "groups of 32 do not divide the width 17", "try int8-channel"),
    ],
)
def test_a_width_that_does_not_fit_is_refused_with_alternatives(name: str, width: int, reason: str, alternative: str) -> None:
    grid = scalar(name)
    for refused in (
        lambda: grid.check(3, width),
        lambda: fitted(grid, torch.ones(3, width)),
        lambda: grid.stored_bits((3, width), torch.float16),
    ):
        with pytest.raises(SchemeError, match=reason) as caught:
            refused()
        assert alternative in str(caught.value)
    for other in alternative.replace("try ", "").split(" or "):
        scalar(other if not other.startswith("-") else f"int4{other}").check(3, width)


@pytest.mark.parametrize("name", ["int4-channel", "int4-tensor", "int4-channel-asym", "fp8", "fp8-tensor"])
def test_grids_without_groups_take_every_width(name: str) -> None:
    for shape in itertools.product((1, 3), (1, 17)):
        scalar(name).check(*shape)
        W = draw(*shape, seed=1, dtype=torch.float32)
        assert error(W, reconstructed(scalar(name), W)) < 0.1 * W.square().sum().item()


@pytest.mark.parametrize("name", ["int2-g16", "int3-channel", "int4-g32", "int8-tensor"])
def test_the_compiled_search_for_scales_is_as_good_as_its_specification(name: str) -> None:
    """Sums are in another order: of two candidates that are equally good another may be taken."""
    grid = parse_scheme(name)
    assert isinstance(grid, Uniform)
    W, weights = draw((48, 64), seed=3).float(), draw((64,), seed=4).float().exp()
    W[5] = 0
    found = grid.fit_scales(W, weights, torch.float32)
    exact = grid.fit_scales(W.double(), weights.double(), torch.float32)

    def loss(scales: dict[str, torch.Tensor]) -> torch.Tensor:
        step = spread(scales["scale"].double(), (48, 64))
        codes = (W.double() / step).round().clamp(*grid.code_range)
        rows, columns = scales["scale"].shape
        return (weights.double() * (W.double() - codes * step).square()).reshape(rows, -1, columns, 64 // columns).sum((1, 3))

    torch.testing.assert_close(loss(found), loss(exact), rtol=1e-4, atol=1e-9)
    apart = (found["scale"] - exact["scale"]).abs() / exact["scale"].abs()
    assert (apart < 1e-5).float().mean() > 0.9
