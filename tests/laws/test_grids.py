"""One conformance suite for every grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laws.problems import draw
from roundel.errors import SchemeError
from roundel.grids import Grid, parse_scheme

NAMES = [f"int{bits}-{kind}" for bits in range(2, 9) for kind in ("g4", "g32", "channel")]
D_IN = 64
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
every_grid = pytest.mark.parametrize("grid", [parse_scheme(name) for name in NAMES], ids=NAMES)
seeds = st.integers(0, 10_000)


def all_codes(grid: Grid) -> torch.Tensor:
    low, high = grid.code_range
    return torch.arange(low, high + 1).to(torch.int8)


def reconstructed(grid: Grid, W: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    scales = grid.fit_scales(W, torch.ones(W.shape[1], dtype=W.dtype), dtype)
    step = grid.expand(scales, W.shape[1]).to(W.dtype)
    return grid.decode(grid.encode(W, step), step)


@every_grid
def test_the_name_is_read_back(grid: Grid) -> None:
    assert grid.name in NAMES
    assert parse_scheme(grid.name) == grid


@every_grid
def test_the_codes_are_as_many_as_the_bits_say(grid: Grid) -> None:
    assert len(all_codes(grid)) == 2**grid.bits


@every_grid
@given(mantissa=st.floats(1, 2), exponent=st.integers(-100, 100), negative=st.booleans())
@settings(max_examples=20, deadline=None)
def test_encode_inverts_decode(grid: Grid, mantissa: float, exponent: int, negative: bool) -> None:
    codes = all_codes(grid)
    scales = torch.full(codes.shape, (-1 if negative else 1) * mantissa * 2.0**exponent)
    assert torch.equal(grid.encode(grid.decode(codes, scales), scales), codes)


@every_grid
@given(seed=seeds, negative=st.booleans())
@settings(max_examples=5, deadline=None)
def test_encode_finds_the_nearest_of_all_codes(grid: Grid, seed: int, negative: bool) -> None:
    values = 3 * draw(50, seed=seed)
    scale = torch.tensor((-1 if negative else 1) * 6.0 / 2**grid.bits, dtype=torch.float64)
    codes = grid.encode(values, scale.expand(50))
    assert codes.dtype == torch.int8
    error = (values - grid.decode(codes, scale.expand(50))).abs()
    levels = all_codes(grid).double() * scale
    torch.testing.assert_close(error, (values[:, None] - levels).abs().amin(1), rtol=1e-12, atol=1e-12)


@every_grid
@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_rounding_twice_is_rounding_once(grid: Grid, seed: int) -> None:
    values, step = draw(40, seed=seed, dtype=torch.float32), draw(40, seed=seed + 1, dtype=torch.float32)
    once = grid.decode(grid.encode(values, step), step)
    assert torch.equal(grid.decode(grid.encode(once, step), step), once)


@every_grid
def test_bits_per_weight_count_codes_and_scales(grid: Grid) -> None:
    groups = D_IN // grid.group_size(D_IN)
    for dtype, scale_bits in ((torch.bfloat16, 16), (torch.float32, 32)):
        assert grid.bits_per_weight(D_IN, dtype) == (D_IN * grid.bits + groups * scale_bits) / D_IN


@every_grid
def test_expand_gives_each_column_its_groups_scale(grid: Grid) -> None:
    size = grid.group_size(D_IN)
    scales = draw(3, D_IN // size, seed=0)
    expanded = grid.expand(scales, D_IN)
    assert expanded.shape == (3, D_IN)
    assert all(torch.equal(expanded[:, j], scales[:, j // size]) for j in range(D_IN))


@every_grid
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_are_always_usable(grid: Grid, dtype: torch.dtype) -> None:
    normal = draw(1, D_IN, seed=1, dtype=torch.float32)
    rows = [
        torch.zeros(1, D_IN),
        torch.full((1, D_IN), 0.7),
        torch.full((1, D_IN), -0.7),
        *(size * normal for size in (1e-44, 1e-38, 1e-30, 1e-6, 1.0, 1e4, 1e6, 1e30)),
        torch.nn.functional.one_hot(torch.tensor([5]), D_IN).float(),
    ]
    W = torch.cat(rows)
    scales = grid.fit_scales(W, torch.ones(D_IN), dtype)
    assert scales.dtype == dtype
    assert scales.shape == (len(W), D_IN // grid.group_size(D_IN))
    assert torch.isfinite(scales).all()
    assert (scales != 0).all()
    decoded = grid.decode(grid.encode(W, grid.expand(scales, D_IN).float()), grid.expand(scales, D_IN).float())
    assert torch.isfinite(decoded).all()
    assert (decoded[0] == 0).all()


@every_grid
@pytest.mark.parametrize("value", [0.7, -0.7, 1e4])
def test_a_constant_row_is_kept(grid: Grid, value: float) -> None:
    W = torch.full((2, D_IN), value)
    torch.testing.assert_close(reconstructed(grid, W), W, rtol=1e-6, atol=0)
    torch.testing.assert_close(reconstructed(grid, W, torch.bfloat16), W, rtol=2**-8, atol=0)


@every_grid
@pytest.mark.parametrize("power", [-20, 20])
def test_scales_are_proportional_to_the_weights(grid: Grid, power: int) -> None:
    W, weights = draw(3, D_IN, seed=power + 100, dtype=torch.float32), draw(D_IN, seed=power, dtype=torch.float32).abs()
    ordinary, scaled = (grid.fit_scales(size * W, weights, torch.float32) for size in (1.0, 2.0**power))
    torch.testing.assert_close(scaled / 2.0**power, ordinary, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("unusual", "dtype"), [(1e30, torch.bfloat16), (1e-30, torch.bfloat16), (1e4, torch.float16)], ids=str)
@pytest.mark.parametrize("bits", [3, 8])
def test_huge_and_tiny_weights_are_rounded_as_well_as_ordinary_ones(bits: int, unusual: float, dtype: torch.dtype) -> None:
    """The sums of squares that compare two scales must neither overflow nor vanish."""
    grid, W = parse_scheme(f"int{bits}-g32"), draw(8, D_IN, seed=4, dtype=torch.float32)
    errors = [((size * W - reconstructed(grid, size * W, dtype)) / size).square().mean() for size in (1.0, unusual)]
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_small_weights_in_float16_are_rounded_as_well_as_ordinary_ones(bits: int) -> None:
    """Weights of a real float16 model: 0.001 in size, so that an 8-bit scale is below the smallest normal float16."""
    grid, W = parse_scheme(f"int{bits}-channel"), draw(8, D_IN, seed=4, dtype=torch.float32)
    errors = [((size * W - reconstructed(grid, size * W, torch.float16)) / size).square().mean() for size in (1.0, 1e-3)]
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("bits", range(2, 7))
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_the_scale_of_weights_on_the_grid_is_found(bits: int, seed: int) -> None:
    grid = parse_scheme(f"int{bits}-g32")
    low, high = grid.code_range
    codes = torch.randint(low, high + 1, (4, D_IN), generator=torch.Generator().manual_seed(seed))
    codes[:, ::32], codes[:, 1::32] = low, high
    scales = draw(4, 2, seed=seed)
    W = grid.decode(codes.to(torch.int8), grid.expand(scales, D_IN))
    torch.testing.assert_close(grid.fit_scales(W, torch.ones(D_IN, dtype=W.dtype), torch.float64), scales)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_signed_searched_scales_beat_absmax(bits: int) -> None:
    grid, W = parse_scheme(f"int{bits}-g32"), draw(64, D_IN, seed=9, dtype=torch.float32)
    ours = (W - reconstructed(grid, W)).square().mean()
    largest = W.unflatten(1, (-1, 32)).abs().amax(-1)
    for levels in (2 ** (bits - 1) - 1, 2 ** (bits - 1) - 0.5):
        step = grid.expand(largest / levels, D_IN)
        assert ours < 0.9 * (W - grid.decode(grid.encode(W, step), step)).square().mean()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_scales_sign_follows_the_longer_tail(bits: int) -> None:
    grid = parse_scheme(f"int{bits}-channel")
    low, _ = grid.code_range
    W = torch.arange(D_IN).float()[None] / D_IN * -low
    assert grid.fit_scales(W, torch.ones(D_IN), torch.float32).item() < 0
    assert grid.fit_scales(-W, torch.ones(D_IN), torch.float32).item() > 0


def test_columns_with_more_weight_are_rounded_better() -> None:
    grid, W = parse_scheme("int3-g32"), draw(200, 32, seed=2, dtype=torch.float32)
    weights = torch.ones(32)
    weights[:4] = 100
    errors = []
    for column in (torch.ones(32), weights):
        step = grid.expand(grid.fit_scales(W, column, torch.float32), 32)
        errors.append((W - grid.decode(grid.encode(W, step), step)).square().mean(0))
    assert errors[1][:4].mean() < 0.8 * errors[0][:4].mean()
    assert (weights * errors[1]).sum() < (weights * errors[0]).sum()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "int4",
        "int",
        "int4-",
        "int4-g",
        "int4-g0",
        "int4-g-8",
        "int4g128",
        "INT4-g128",
        "int1-g128",
        "int9-channel",
        "int0-g8",
        "fp4-g16",
    ],
)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(SchemeError):
        parse_scheme(name)


@pytest.mark.parametrize("width", [100, 70])
def test_a_group_that_does_not_divide_is_refused_with_alternatives(width: int) -> None:
    with pytest.raises(SchemeError, match=rf"group size 32 does not divide the width {width}; try .*int4-?.*-channel") as caught:
        parse_scheme("int4-g32").group_size(width)
    if width == 100:
        assert "int4-g4 or -channel" in str(caught.value)


def test_a_channel_grid_takes_every_width() -> None:
    assert parse_scheme("int4-channel").group_size(17) == 17
