"""Feedback and descent on tiles against their definitions, and refitted scales against dense least squares; float64 throughout."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laws.problems import covariance, draw, loss, random_problem, scales_for, with_factors
from roundel.grids import Grid, ScalarGrid, Scales, TileGrid, parse_scheme
from roundel.linalg.ldl import block_lower, ldl
from roundel.rounding import feedback, nearest, refit_scales, round_weight, round_weights, tiles
from roundel.rounding.scale import Refits
from roundel.rounding.state import State, roughly_curved
from roundel.rounding.tiles import in_step
from roundel.types import RoundedWeight, RoundingProblem

seeds = st.integers(0, 10_000)


@dataclass(frozen=True, kw_only=True)
class Book(TileGrid):
    """128 random codewords for tiles of `high x wide`; the coder compares with all of them."""

    high: int = 2
    wide: int = 4

    @property
    def name(self) -> str:
        return f"book{self.high}x{self.wide}"

    @property
    def bits(self) -> float:
        return 7 / (self.high * self.wide)

    @property
    def book(self) -> Tensor:
        return draw(128, self.high * self.wide, seed=7).float()

    @property
    def rms(self) -> float:
        return self.book.square().mean().sqrt().item()

    def tile(self, d_out: int, d_in: int) -> tuple[int, int]:
        return self.high, self.wide

    def tile_bits(self) -> int:
        return 7

    def encode_tiles(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        weights = torch.ones_like(values) if weights is None else weights
        errors = (weights[:, None] * (values[:, None] - self.book.to(values)).square()).sum(2)
        return errors.argmin(1, keepdim=True).to(torch.int16)

    def decode_tiles(self, codes: Tensor) -> Tensor:
        return self.book[codes[:, 0].long()]


def feedback_tiles(problem: RoundingProblem, grid: TileGrid, scales: Scales) -> Tensor:
    return in_step([tiles.feedback_tiles(problem, grid, scales)], grid)[0]


def sweep_tiles(problem: RoundingProblem, grid: TileGrid, scales: Scales, codes: Tensor) -> Tensor:
    return in_step([tiles.sweep_tiles(problem, grid, scales, codes)], grid)[0]


BOOK, TALL, LATTICE = Book(), Book(high=4, wide=1), parse_scheme("lattice2")
TRELLIS = parse_scheme("trellis2-s4")
EXACT = [BOOK, TALL, LATTICE]
"""Their coders find the best codes."""
names = [grid.name for grid in EXACT]
shapes = st.tuples(st.integers(1, 11), st.integers(1, 21))


def padded(H: Tensor, block: int) -> Tensor:
    """With an identity in the corner, to whole blocks."""
    return torch.block_diag(H, torch.eye(-len(H) % block, dtype=H.dtype))


def block_ldl(H: Tensor, block: int) -> tuple[Tensor, list[Tensor]]:
    """By block elimination: unit block lower `L` and the diagonal blocks."""
    L, D, rest = torch.zeros_like(H), [], H.clone()
    for k in range(0, len(H), block):
        own = slice(k, k + block)
        D.append(rest[own, own].clone())
        L[:, own] = rest[:, own] @ torch.linalg.inv(D[-1])
        rest = rest - L[:, own] @ D[-1] @ L[:, own].T
    return L.tril() + torch.triu(L, 1) * (L.abs() > 1e-9), D


def naive(problem: RoundingProblem, grid: TileGrid, scale: float) -> Tensor:
    """Tiles from the last to the first, each with the tile of `W + L_out^T E L_in - E` as its target."""
    (d_out, d_in), (high, wide) = problem.shape, grid.tile(*problem.shape)
    (L_out, D_out), (L_in, D_in) = block_ldl(padded(problem.H_out, high), high), block_ldl(padded(problem.H_in, wide), wide)
    down, across = len(D_out), len(D_in)
    W = torch.zeros(down * high, across * wide, dtype=torch.float64)
    W[:d_out, :d_in] = problem.W
    E, codes = torch.zeros_like(W), {}
    row, column = (lambda i: slice(i * high, (i + 1) * high)), (lambda j: slice(j * wide, (j + 1) * wide))
    for i in range(down - 1, -1, -1):
        for j in range(across - 1, -1, -1):
            target = W[row(i), column(j)].clone()
            for k in range(i, down):
                for m in range(j, across):
                    if (k, m) != (i, j):
                        target += L_out[row(k), row(i)].T @ E[row(k), column(m)] @ L_in[column(m), column(j)]
            weights = torch.outer(D_out[i].diagonal(), D_in[j].diagonal())
            weights[max(0, d_out - i * high) :] = 0
            weights[:, max(0, d_in - j * wide) :] = 0
            codes[i, j] = grid.encode_tiles(target.reshape(1, -1) / scale, weights.reshape(1, -1) / weights.sum())
            E[row(i), column(j)] = W[row(i), column(j)] - scale * grid.decode_tiles(codes[i, j]).double().reshape(high, wide)
            E[d_out:], E[:, d_in:] = 0, 0
    return torch.stack([torch.cat([codes[i, j] for j in range(across)]) for i in range(down)])


def rounded(grid: Grid, codes: Tensor, scales: Scales, shape: tuple[int, int]) -> RoundedWeight:
    return RoundedWeight(scheme=grid.name, codes=codes, scales=scales, shape=shape)


def loss_of(problem: RoundingProblem, grid: Grid, codes: Tensor, scales: Scales) -> float:
    return loss(problem, grid, rounded(grid, codes, scales, problem.shape))


def same(problem: RoundingProblem, grid: TileGrid, scales: Scales, first: Tensor, second: Tensor) -> bool:
    """The same weights: where a tile is filled up, several codes stand for them."""
    return torch.equal(*(grid.dequantize(codes, scales, problem.shape, torch.float64) for codes in (first, second)))


def random_codes(grid: TileGrid, shape: tuple[int, int], seed: int) -> Tensor:
    (high, wide), size = grid.tile(*shape), 128 if isinstance(grid, Book) else 1 << 16
    counts = (-(-shape[0] // high), -(-shape[1] // wide), 1)
    return torch.randint(size, counts, generator=torch.Generator().manual_seed(seed)).to(
        torch.int16 if isinstance(grid, Book) else torch.int32
    )


@pytest.mark.parametrize(("d", "block"), [(1, 1), (8, 1), (8, 8), (24, 4), (48, 16)])
def test_block_factors_multiply_back(d: int, block: int) -> None:
    H = covariance(d, seed=d) + 0.1 * torch.eye(d, dtype=torch.float64)
    found = ldl(H)
    assert found is not None
    L = block_lower(found[0], block)
    D = torch.linalg.inv(L) @ H @ torch.linalg.inv(L).T
    on_diagonal = torch.block_diag(*[torch.ones(block, block)] * (d // block)).bool()
    identity = torch.eye(d, dtype=torch.float64)
    assert torch.equal(L.tril(), L)
    assert torch.equal(torch.where(on_diagonal, L, 0), identity)
    assert D[~on_diagonal].abs().sum() < 1e-10 * H.abs().sum()
    torch.testing.assert_close(L @ torch.where(on_diagonal, D, 0) @ L.T, H, rtol=0, atol=1e-10)
    torch.testing.assert_close(L, block_ldl(H, block)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("grid", EXACT, ids=names)
@given(shape=shapes, seed=seeds)
@settings(max_examples=8, deadline=None)
def test_feedback_equals_the_naive_loops(grid: TileGrid, shape: tuple[int, int], seed: int) -> None:
    problem = random_problem(*shape, seed=seed)
    scales = scales_for(problem, grid)
    assert same(problem, grid, scales, feedback_tiles(problem, grid, scales), naive(problem, grid, scales["scale"].double().item()))


@pytest.mark.parametrize("shape", [(32, 48), (5, 70), (40, 20)], ids=str)
def test_feedback_of_a_trellis_equals_the_naive_loops(shape: tuple[int, int]) -> None:
    problem = random_problem(*shape, seed=shape[1])
    scales = scales_for(problem, TRELLIS)
    codes = feedback_tiles(problem, TRELLIS, scales)
    assert codes.shape[0] * codes.shape[1] > 1
    assert same(problem, TRELLIS, scales, codes, naive(problem, TRELLIS, scales["scale"].double().item()))


@pytest.mark.parametrize("grid", EXACT, ids=names)
@given(shape=shapes, seed=seeds)
@settings(max_examples=8, deadline=None)
def test_identity_H_out_is_one_sided(grid: TileGrid, shape: tuple[int, int], seed: int) -> None:
    """Columns of tiles from the last to the first, each shifted by the errors of those after it, rows by themselves (LDLQ)."""
    d_out, d_in = shape
    problem = with_factors(draw(*shape, seed=seed), torch.eye(d_out, dtype=torch.float64), covariance(d_in, seed), damping=0.05)
    scales = scales_for(problem, grid)
    scale, (high, wide) = scales["scale"].double().item(), grid.tile(*shape)
    L, D = block_ldl(padded(problem.H_in, wide), wide)
    W = torch.nn.functional.pad(problem.W, (0, -d_in % wide, 0, -d_out % high))
    inside, E, found = torch.zeros_like(W), torch.zeros_like(W), []
    inside[:d_out, :d_in] = 1
    for j in range(len(D) - 1, -1, -1):
        own = slice(j * wide, (j + 1) * wide)
        target = W[:, own] + E[:, (j + 1) * wide :] @ L[(j + 1) * wide :, own]
        weights = (D[j].diagonal() * inside[:, own]).reshape(-1, high * wide)
        found.append(grid.encode_tiles(target.reshape(-1, high * wide) / scale, weights / weights.sum(1, keepdim=True)))
        E[:, own] = (W[:, own] - scale * grid.decode_tiles(found[-1]).double().reshape(-1, wide)) * inside[:, own]
    assert same(problem, grid, scales, feedback_tiles(problem, grid, scales), torch.stack(found[::-1], dim=1))


@pytest.mark.parametrize("grid", EXACT, ids=names)
@given(shape=shapes, seed=seeds)
@settings(max_examples=8, deadline=None)
def test_diagonal_factors_give_the_coders_own_tiles(grid: TileGrid, shape: tuple[int, int], seed: int) -> None:
    h_out, h_in = (draw(d, seed=seed + k).abs() + 0.1 for k, d in enumerate(shape))
    problem = with_factors(draw(*shape, seed=seed + 2), torch.diag(h_out), torch.diag(h_in))
    scales = scales_for(problem, grid)
    codes = feedback_tiles(problem, grid, scales)
    values, weights = grid.to_tiles(problem.W / scales["scale"].double()), grid.to_tiles(torch.outer(h_out, h_in))
    assert same(problem, grid, scales, codes, grid.encode_tiles(values, weights).unflatten(0, codes.shape[:2]))
    assert torch.equal(sweep_tiles(problem, grid, scales, codes), codes)


@pytest.mark.parametrize("grid", EXACT, ids=names)
@given(shape=shapes, seed=seeds)
@settings(max_examples=5, deadline=None)
def test_weights_on_the_grid_are_returned(grid: TileGrid, shape: tuple[int, int], seed: int) -> None:
    codes, scales = random_codes(grid, shape, seed), {"scale": torch.full((1, 1), 0.37)}
    W = grid.dequantize(codes, scales, shape, torch.float64)
    problem = replace(random_problem(*shape, seed=seed), W=W)
    for found in (feedback_tiles(problem, grid, scales), sweep_tiles(problem, grid, scales, codes)):
        assert loss_of(problem, grid, found, scales) == 0
    assert torch.equal(refit_scales(problem, grid, scales, codes)["scale"], scales["scale"])


@pytest.mark.parametrize("grid", EXACT, ids=names)
@given(shape=shapes, seed=seeds)
@settings(max_examples=8, deadline=None)
def test_a_sweep_lowers_the_loss_by_what_it_has_accepted(grid: TileGrid, shape: tuple[int, int], seed: int) -> None:
    """From random codes, so that many tiles of one call change and have to be judged together; until nothing changes."""
    problem = random_problem(*shape, seed=seed)
    scales, codes, expected = scales_for(problem, grid), random_codes(grid, shape, seed), []
    accept = tiles._accept

    def recorded(change, P, curved, H_out, H_in, i, j, rows, columns) -> Tensor:
        taken = accept(change, P, curved, H_out, H_in, i, j, rows, columns)
        D = torch.zeros(len(H_out), len(H_in), dtype=torch.float64)
        linear = 0.0
        for k in taken.tolist():
            D[i[k] * rows : (i[k] + 1) * rows, j[k] * columns : (j[k] + 1) * columns] = change[k]
            linear += (change[k] * P[k]).sum().item()
        expected.append(linear - 0.5 * ((H_out @ D @ H_in) * D).sum().item())
        assert expected[-1] >= 0
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_accept", recorded)
        for _ in range(300):
            before = loss_of(problem, grid, codes, scales)
            expected.clear()
            kept = codes.clone()
            swept = sweep_tiles(problem, grid, scales, codes)
            assert torch.equal(codes, kept)
            assert before - loss_of(problem, grid, swept, scales) == pytest.approx(sum(expected), rel=1e-9, abs=1e-9 * before)
            if torch.equal(swept, codes):
                assert sum(expected) == 0
                break
            codes = swept
        else:
            raise AssertionError("300 sweeps did not converge")


@pytest.mark.parametrize("grid", [BOOK, LATTICE, TRELLIS], ids=lambda grid: grid.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 40)), seed=seeds)
@settings(max_examples=5, deadline=None)
def test_a_sweep_never_raises_the_loss(dtype: torch.dtype, grid: TileGrid, shape: tuple[int, int], seed: int) -> None:
    problem = random_problem(*shape, seed=seed, dtype=dtype)
    scales = scales_for(problem, grid)
    codes = feedback_tiles(problem, grid, scales)
    before = loss_of(problem, grid, codes, scales)
    for _ in range(2):
        codes = sweep_tiles(problem, grid, scales, codes)
        after = loss_of(problem, grid, codes, scales)
        assert after <= before * (1 + (1e-9 if dtype == torch.float64 else 1e-5))
        before = after


@pytest.mark.parametrize("grid", [BOOK, LATTICE, TRELLIS], ids=lambda grid: grid.name)
def test_each_stage_lowers_the_mean_loss(grid: TileGrid) -> None:
    """On the mean over draws: no stage is better for every single matrix."""
    shape = (34, 48)
    totals = torch.zeros(4)
    for seed in range(12):
        problem = random_problem(*shape, seed=seed)
        one_sided = replace(problem, L_out=torch.eye(shape[0], dtype=torch.float64), H_out=torch.eye(shape[0], dtype=torch.float64))
        scales = scales_for(problem, grid)
        own = grid.encode_tiles(grid.to_tiles(problem.W / scales["scale"]))
        fed = feedback_tiles(problem, grid, scales)
        own = own.unflatten(0, fed.shape[:2])
        results = [own, feedback_tiles(one_sided, grid, scales), fed, sweep_tiles(problem, grid, scales, fed)]
        losses = torch.tensor([loss_of(problem, grid, codes, scales) for codes in results])
        totals += losses / losses[0]
    nearest, one_sided_, two_sided, swept = (totals / 12).tolist()
    assert swept < 0.97 * two_sided
    assert two_sided < 0.97 * one_sided_
    assert one_sided_ < 0.97 * nearest


def first_codes(problem: RoundingProblem, grid: Grid, scales: Scales) -> Tensor:
    if isinstance(grid, ScalarGrid):
        return feedback(problem, grid, scales)
    assert isinstance(grid, TileGrid)
    return feedback_tiles(problem, grid, scales)


REFITTED = {
    "int3-g8": (5, 32),
    "int3-channel": (5, 24),
    "int3-tensor": (5, 24),
    "int4-g8-asym": (5, 32),
    "int4-channel-asym": (5, 24),
    "int4-g8-affine": (5, 32),
    "fp8": (5, 24),
    "fp8-tensor": (5, 24),
    "nvfp4": (4, 48),
    "q4_0": (4, 64),
    "q8_0": (4, 64),
    "iq4_nl": (4, 64),
    "q2_k": (3, 512),
    "q3_k": (2, 512),
    "q4_k": (3, 512),
    "q5_k": (2, 256),
    "q6_k": (2, 256),
    "iq2_s": (2, 256),
    "iq3_xxs": (2, 512),
    "lattice2": (5, 21),
    "trellis2-s4": (17, 20),
}
"""All grids with scales that can be refitted, and shapes with several of them."""


@pytest.mark.parametrize("scheme", REFITTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refitted_scales_never_raise_the_loss(scheme: str, dtype: torch.dtype) -> None:
    grid = parse_scheme(scheme)
    for seed in range(3):
        problem = random_problem(*REFITTED[scheme], seed=seed, dtype=dtype)
        scales = scales_for(problem, grid, torch.bfloat16)
        codes = first_codes(problem, grid, scales)
        refitted = refit_scales(problem, grid, scales, codes)
        before, after = (loss_of(problem, grid, codes, each) for each in (scales, refitted))
        assert after <= before * (1 + (1e-9 if dtype == torch.float64 else 1e-5))
        assert {name: each.dtype for name, each in refitted.items()} == {name: each.dtype for name, each in scales.items()}
        assert all(each.double().isfinite().all() for each in refitted.values())


@pytest.mark.parametrize("scheme", REFITTED)
def test_refitted_scales_are_the_least_squares_of_all_at_once(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense normal equations, with a column for each scale that is the difference it makes; as if scales were stored exactly."""
    grid, shape = parse_scheme(scheme), REFITTED[scheme]
    problem = random_problem(*shape, seed=1)
    scales = scales_for(problem, grid, torch.bfloat16)
    codes = first_codes(problem, grid, scales)
    monkeypatch.setattr(type(grid), "stored", lambda _self, _name, values, like: values)
    free = list(grid.parts(codes, scales, shape, torch.float64))
    minima, single = scheme in ("q2_k", "q4_k", "q5_k"), scheme[0] in "qi" and "_" in scheme
    assert free == (["scale", "bias"] if "affine" in scheme else ["d", "dmin"] if minima else ["d"] if single else ["scale"])
    base = {name: each.double() if name in free else each for name, each in scales.items()}
    zero = grid.dequantize(
        codes, {name: torch.zeros_like(each) if name in free else each for name, each in base.items()}, shape, torch.float64
    )
    columns = []
    for name in free:
        for k in range(base[name].numel()):
            unit = {other: torch.zeros_like(each) if other in free else each for other, each in base.items()}
            unit[name] = unit[name].clone()
            unit[name].view(-1)[k] = 1
            columns.append((grid.dequantize(codes, unit, shape, torch.float64) - zero).flatten())
    A = torch.stack(columns, dim=1)
    root = torch.kron(torch.linalg.cholesky(problem.H_out).T.contiguous(), torch.linalg.cholesky(problem.H_in).T.contiguous())
    best = torch.linalg.lstsq(root @ A, root @ (problem.W - zero).flatten()).solution
    least = 0.5 * (root @ ((problem.W - zero).flatten() - A @ best)).square().sum().item()
    refitted = refit_scales(problem, grid, base, codes, steps=60)
    before, after = loss_of(problem, grid, codes, scales), loss_of(problem, grid, codes, refitted)
    assert least < before
    assert after == pytest.approx(least, rel=1e-8)
    refits, usual = Refits(problem, grid, roughly_curved(problem, None)), State.of(problem, grid, base, codes)
    for part in (0.6, 0.7):  # the few steps that are usual get most of it, and the next ones go on from them
        usual = refits.refit(usual)
        assert before - loss_of(problem, grid, codes, usual.scales) > part * (before - least)


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [
        ("lattice2", (24, 64)),
        ("lattice2", (9, 21)),
        ("trellis2-s8", (32, 48)),
        ("trellis2-s8", (20, 30)),
        ("q4_k", (6, 256)),
        ("iq2_xs", (6, 256)),
        ("iq3_s", (6, 512)),
        ("int4-g8-asym", (24, 64)),
        ("int4-g8-affine", (24, 64)),
        ("nvfp4", (24, 64)),
        ("mxfp4", (24, 64)),
    ],
)
def test_the_trace_of_losses_falls_and_ends_with_the_answers(scheme: str, shape: tuple[int, int]) -> None:
    grid = parse_scheme(scheme)
    problem = random_problem(*shape, seed=shape[0], dtype=torch.float32)
    result = round_weight(problem, grid, sweeps=4, scale_dtype=torch.bfloat16)
    assert 2 <= len(result.trace) <= 5
    assert all(later < earlier for earlier, later in zip(result.trace, result.trace[1:], strict=False))
    assert result.trace[-1] == pytest.approx(loss(problem, grid, result), rel=1e-3)
    assert (result.scheme, result.shape) == (scheme, shape)
    again = round_weight(problem, grid, sweeps=4, scale_dtype=torch.bfloat16)
    assert torch.equal(again.codes, result.codes)


def test_the_test_grid_is_a_tile_grid_of_its_own() -> None:
    problem = random_problem(7, 9, seed=0)
    result = round_weight(problem, BOOK, sweeps=3, scale_dtype=torch.float32)
    assert result.codes.shape == (4, 3, 1)
    assert result.trace[-1] == pytest.approx(loss(problem, BOOK, result), rel=1e-9)


@pytest.mark.parametrize("grid", [LATTICE, TRELLIS], ids=lambda grid: grid.name)
def test_a_weight_of_zeros_is_coded_as_nothing(grid: TileGrid) -> None:
    problem = replace(random_problem(6, 24, seed=2, dtype=torch.float32), W=torch.zeros(6, 24))
    result = round_weight(problem, grid, sweeps=2, scale_dtype=torch.float32)
    assert grid.dequantize(result.codes, result.scales, (6, 24), torch.float32).abs().max() < 1e-30


def test_tiles_with_steps_of_their_own_gain_from_every_stage() -> None:
    """Feedback and sweeps of tiles in units of scales for groups: as if each tile's step were the grid's, which no other grid has."""
    grid, shape, totals = parse_scheme("iq3_xxs"), (12, 256), torch.zeros(3, dtype=torch.float64)
    assert isinstance(grid, TileGrid)
    for seed in range(3):
        problem = random_problem(*shape, seed=seed)
        problem = replace(problem, W=problem.W * torch.logspace(-1, 1, 8, dtype=torch.float64).repeat_interleave(32))
        scales = scales_for(problem, grid)
        assert len(grid.steps(scales, shape, torch.float64).unique()) > 8
        fed = feedback_tiles(problem, grid, scales)
        results = [nearest(problem.W, grid, scales), fed, sweep_tiles(problem, grid, scales, fed)]
        losses = torch.tensor([loss_of(problem, grid, codes, scales) for codes in results])
        totals += losses / losses[0]
    rounded, two_sided, swept = totals.tolist()
    assert swept < 0.97 * two_sided
    assert two_sided < 0.8 * rounded


@pytest.mark.parametrize("grid", [BOOK, TALL, LATTICE, TRELLIS, parse_scheme("int3-g4")], ids=lambda grid: grid.name)
def test_weights_rounded_together_are_as_if_alone(grid: Grid) -> None:
    """Of different shapes, so that some loops end before others; and in the order in which they were given."""
    shapes = [(9, 20), (40, 8), (3, 4), (16, 32)]
    problems = [random_problem(*shape, seed=k) for k, shape in enumerate(shapes)]
    together = round_weights(problems, grid, sweeps=3, scale_dtypes=[torch.float16] * len(problems))
    for problem, found in zip(problems, together, strict=True):
        alone = round_weight(problem, grid, sweeps=3, scale_dtype=torch.float16)
        assert torch.equal(found.codes, alone.codes)
        assert found.shape == problem.shape
        assert found.trace == alone.trace


def test_waves_of_several_weights_are_one_call_of_the_coder(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, encode = [], Book.encode_tiles
    monkeypatch.setattr(Book, "encode_tiles", lambda *given: calls.append(given) or encode(*given))
    problems = [random_problem(8, 16, seed=k) for k in range(5)]
    in_step([tiles.feedback_tiles(problem, BOOK, scales_for(problem, BOOK)) for problem in problems], BOOK)
    assert len(calls) == 4 + 4 - 1
