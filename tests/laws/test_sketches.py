"""One conformance suite for every estimator."""

import dataclasses
import re
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laws.problems import covariance, draw
from roundel.curvature.sketches import ESTIMATORS, Auto, Diagonal, Estimator, Sketch, SketchB, Triangular, parse_curvature
from roundel.errors import SchemeError
from roundel.linalg.gram import add_gram, gram, symmetrise
from roundel.types import Factors, KroneckerFactors, LayerGrad, LayerInput

CPU = torch.device("cpu")
D_OUT, D_IN = 6, 9
MORE = ["sketch-b:rounds=3", "triangular:rounds=1:shrinkage=0", "diagonal:of=triangular", "diagonal:of=sketch-a"]
MORE += [
    "fastkron:tolerance=0",
    "fastkron:steps=2:batch=3",
    "diagonal:of=fastkron",
    "guided:groups=1",
    "guided:groups=6",
    "diagonal:of=guided",
]
TOKEN_INDEPENDENT = {"identity", "activation", "imatrix", "kfac", "sketch-a", "diagonal:of=sketch-a"}
TOKEN_INDEPENDENT |= {"guided", "guided:groups=1", "guided:groups=6", "diagonal:of=guided"}
CLOSELY, EXACTLY = {"rtol": 1e-4, "atol": 1e-5}, {"rtol": 0, "atol": 0}
every_estimator = pytest.mark.parametrize("name", [*ESTIMATORS, *MORE])
seeds = st.integers(0, 10_000)


def stream(sequences: int, tokens: int, *, d_out: int = D_OUT, d_in: int = D_IN, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and gradients whose tokens are correlated, and correlated with each other."""
    x, g = draw(sequences, tokens, d_in, seed=seed), draw(sequences, tokens, d_out, seed=seed + 1)
    common = draw(sequences, 1, 1, seed=seed + 2)
    return (x * (1 + common) + 0.5 * x.mean(1, keepdim=True)).float(), (g * (1 + common) + 0.3).float()


def layer_grad(x: Tensor, g: Tensor) -> LayerGrad:
    return LayerGrad(input=LayerInput(x.clone()), g=g.clone())


def filled(
    estimator: Estimator,
    x: Tensor,
    g: Tensor,
    *,
    batch: int,
    index: int = 0,
    previous: KroneckerFactors | None = None,
    finish: bool = True,
) -> Sketch:
    sketch = estimator.sketch(g.shape[2], x.shape[2], CPU, index=index, previous=previous)
    for start in range(0, len(x), batch):
        sketch.update(layer_grad(x[start : start + batch], g[start : start + batch]))
    if finish:
        sketch.finish()
    return sketch


def factors_of_each_pass(estimator: Estimator, x: Tensor, g: Tensor) -> list[Factors]:
    found: list[Factors] = []
    for index in range(estimator.passes):
        previous = found[-1] if found else None
        assert previous is None or isinstance(previous, KroneckerFactors)  # groups only come from a last pass
        found.append(filled(estimator, x, g, batch=1, index=index, previous=previous).factors())
    return found


def previous_of_each_pass(estimator: Estimator, x: Tensor, g: Tensor) -> list[KroneckerFactors | None]:
    """For each pass the factors that it starts from."""
    return [None, *factors_of_each_pass(estimator, x, g)[:-1]]


def groups_of(factors: Factors) -> list[KroneckerFactors]:
    return [group for _, group in factors.row_groups()]


def assert_same(one: Factors, other: Factors, *, exactly: bool = False) -> None:
    for ours, theirs in zip(groups_of(one), groups_of(other), strict=True):
        torch.testing.assert_close(ours.H_out, theirs.H_out, **EXACTLY if exactly else CLOSELY)
        torch.testing.assert_close(ours.H_in, theirs.H_in, **EXACTLY if exactly else CLOSELY)
        assert ours.scale == pytest.approx(theirs.scale, rel=0 if exactly else 1e-5, abs=0)


@every_estimator
@given(sequences=st.integers(1, 5), tokens=st.integers(1, 12), seed=seeds)
@settings(max_examples=10, deadline=None)
def test_factors_are_positive_with_mean_diagonal_one(name: str, sequences: int, tokens: int, seed: int) -> None:
    x, g = stream(sequences, tokens, seed=seed)
    for factors in factors_of_each_pass(parse_curvature(name), x, g):
        assert factors.scale > 0
        assert sum(group.H_out.shape[0] for group in groups_of(factors)) == D_OUT
        for group in groups_of(factors):
            assert group.scale > 0
            for H, size in ((group.H_out, len(group.H_out)), (group.H_in, D_IN)):
                assert H.shape == (size, size)
                assert torch.equal(H, H.T)
                assert H.diagonal().mean().item() == pytest.approx(1, rel=1e-5)
                assert torch.linalg.eigvalsh(H.double()).min() > -1e-5


@every_estimator
@pytest.mark.parametrize("tokens", [2, 40])
def test_merging_equals_one_pass(name: str, tokens: int) -> None:
    estimator, (x, g) = parse_curvature(name), stream(6, tokens)
    cut = 4 // estimator.together * estimator.together
    for index, previous in enumerate(previous_of_each_pass(estimator, x, g)):
        whole, merged, other = (
            filled(estimator, x[rows], g[rows], batch=2, index=index, previous=previous) for rows in (slice(6), slice(cut), slice(cut, 6))
        )
        merged.merge(other)
        assert merged.sums.keys() == whole.sums.keys()
        for key, total in whole.sums.items():
            torch.testing.assert_close(merged.sums[key], total, rtol=1e-5, atol=1e-5 * total.abs().max().item())
        assert merged.tokens == whole.tokens == 6 * tokens
        assert_same(merged.factors(), whole.factors())


@every_estimator
def test_merging_into_an_empty_sketch_equals_one_pass(name: str) -> None:
    estimator, (x, g) = parse_curvature(name), stream(4, 10)
    for index, previous in enumerate(previous_of_each_pass(estimator, x, g)):
        total = estimator.sketch(D_OUT, D_IN, CPU, index=index, previous=previous)
        for row in range(0, 4, estimator.together):
            rows = slice(row, row + estimator.together)
            total.merge(filled(estimator, x[rows], g[rows], batch=1, index=index, previous=previous))
        assert_same(total.factors(), filled(estimator, x, g, batch=4, index=index, previous=previous).factors())


@every_estimator
def test_sums_and_tokens_are_the_whole_state(name: str) -> None:
    """What is stored of a sketch: the lower triangles of its sums, and its count of tokens."""
    estimator, (x, g) = parse_curvature(name), stream(4, 10)
    for index, previous in enumerate(previous_of_each_pass(estimator, x, g)):
        stopped = filled(estimator, x[:2], g[:2], batch=2, index=index, previous=previous, finish=False)
        restored = estimator.sketch(D_OUT, D_IN, CPU, index=index, previous=previous)
        restored.tokens = stopped.tokens
        for key, total in restored.sums.items():
            square = total.ndim == 2 and total.shape[0] == total.shape[1]
            total.copy_(stopped.sums[key].tril() if square else stopped.sums[key])
        restored.update(layer_grad(x[2:], g[2:]))
        restored.finish()
        whole = filled(estimator, x, g, batch=4, index=index, previous=previous)
        assert_same(restored.factors(), whole.factors())


@every_estimator
def test_sketches_of_other_sizes_or_kinds_do_not_merge(name: str) -> None:
    sketch = parse_curvature(name).sketch(D_OUT, D_IN, CPU)
    with pytest.raises(ValueError, match="cannot merge"):
        sketch.merge(parse_curvature(name).sketch(D_IN, D_OUT, CPU))
    other = "kfac" if name != "kfac" else "mean"
    with pytest.raises(ValueError, match="cannot merge"):
        sketch.merge(parse_curvature(other).sketch(D_OUT, D_IN, CPU))


@every_estimator
def test_sketches_of_other_passes_do_not_merge(name: str) -> None:
    estimator, (x, g) = parse_curvature(name), stream(3, 5)
    sketches = [
        estimator.sketch(D_OUT, D_IN, CPU, index=index, previous=previous)
        for index, previous in enumerate(previous_of_each_pass(estimator, x, g))
    ]
    for one, other in permutations(sketches, 2):
        with pytest.raises(ValueError, match="cannot merge"):
            one.merge(other)


@every_estimator
@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
def test_batches_do_not_matter_bit_for_bit(name: str, tokens: int) -> None:
    estimator, (x, g) = parse_curvature(name), stream(4, tokens)
    for index, previous in enumerate(previous_of_each_pass(estimator, x, g)):
        single, *others = (filled(estimator, x, g, batch=batch, index=index, previous=previous) for batch in (1, 2, 3, 4))
        for other in others:
            assert other.tokens == single.tokens
            assert all(torch.equal(other.sums[key], total) for key, total in single.sums.items())
            assert_same(other.factors(), single.factors(), exactly=True)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_batches_do_not_matter_for_inner_products_bit_for_bit(tokens: int) -> None:
    x, g = stream(5, tokens)
    E = draw(D_OUT, D_IN, seed=3, dtype=torch.float32)
    expected = [layer_grad(x[s : s + 1], g[s : s + 1]).inner(0, E).item() for s in range(5)]
    for batch in (2, 3, 5):
        parts = [layer_grad(x[start : start + batch], g[start : start + batch]) for start in range(0, 5, batch)]
        assert [part.inner(sequence, E).item() for part in parts for sequence in part.sequences()] == expected
    G = torch.einsum("sto,sti->soi", g.double(), x.double())
    torch.testing.assert_close(torch.tensor(expected, dtype=torch.float64), (G * E.double()).sum((1, 2)), rtol=1e-5, atol=1e-4)


@every_estimator
def test_linears_that_share_an_input_do_not_disturb_each_other(name: str) -> None:
    estimator, (x, g) = parse_curvature(name), stream(2, 5)
    shared = LayerInput(x)
    sketches = [estimator.sketch(D_OUT, D_IN, CPU) for _ in range(2)]
    for sketch in sketches:
        sketch.update(LayerGrad(input=shared, g=g))
        sketch.finish()
    alone = filled(estimator, x, g, batch=2)
    for sketch in sketches:
        assert all(torch.equal(sketch.sums[key], total) for key, total in alone.sums.items())


@every_estimator
@pytest.mark.parametrize("tokens", [2, 30])
def test_the_scale_carries_the_trace_per_token(name: str, tokens: int) -> None:
    x, g = stream(3, tokens)
    factors = factors_of_each_pass(parse_curvature(name), x, g)[-1]
    G = torch.einsum("sto,sti->soi", g.double(), x.double())
    cross_token = G.square().sum() / (3 * tokens)
    token_independent = torch.einsum("sto,sti->stoi", g.double(), x.double()).square().sum() / (3 * tokens)
    expected = token_independent if name in TOKEN_INDEPENDENT else cross_token
    trace = sum(group.scale * group.H_out.trace().item() * group.H_in.trace().item() for group in groups_of(factors))
    assert trace == pytest.approx(expected.item(), rel=1e-4)


@every_estimator
def test_no_gradient_at_all_gives_scale_zero(name: str) -> None:
    x, g = stream(2, 3)
    estimator = parse_curvature(name)
    assert all(factors.scale == 0 for factors in factors_of_each_pass(estimator, x, torch.zeros_like(g)))
    if estimator.passes == 1:
        sketch = filled(estimator, x, torch.zeros_like(g), batch=2)
        assert all(candidate.factors.scale == 0 for candidate in estimator.candidates(sketch).values())


@every_estimator
def test_the_first_candidate_is_the_estimate_itself(name: str) -> None:
    estimator, (x, g) = parse_curvature(name), stream(4, 6)
    last = previous_of_each_pass(estimator, x, g)[-1]
    sketch = filled(estimator, x, g, batch=2, index=estimator.passes - 1, previous=last)
    candidates = estimator.candidates(sketch)
    first = next(iter(candidates.values()))
    assert_same(first.factors, sketch.factors(), exactly=True)
    assert first.damping == 1
    assert all(candidate.factors.scale > 0 for candidate in candidates.values())
    assert (estimator.held_out(10**6) > 0) == (len(candidates) > 1)


def test_the_candidates_of_auto_by_their_definition() -> None:
    x, g = stream(5, 7)
    estimator = Auto()
    sketch = filled(estimator, x, g, batch=2, index=estimator.passes - 1, previous=previous_of_each_pass(estimator, x, g)[-1])
    found, own = estimator.candidates(sketch), sketch.factors()
    kfac, activation = (filled(parse_curvature(name), x, g, batch=2).factors() for name in ("kfac", "activation"))
    preferred = next(iter(found))
    dampings = {label: candidate.damping for label, candidate in found.items()}
    assert dampings == {preferred: 1, f"{preferred}, damped": 4, "kfac": 1, "input only": 1}
    for label, expected in ((preferred, own), (f"{preferred}, damped", own), ("kfac", kfac), ("input only", activation)):
        # one absolute size for all: that of the gradients with their cross-token terms
        assert_same(found[label].factors, dataclasses.replace(expected, scale=own.scale))
    assert torch.equal(found["input only"].factors.H_out, torch.eye(D_OUT))


def test_but_for_the_choice_auto_is_the_estimator_that_it_is_based_on() -> None:
    x, g = stream(5, 7)
    (base,) = Auto.__bases__
    for ours, theirs in zip(factors_of_each_pass(Auto(), x, g), factors_of_each_pass(base(), x, g), strict=True):
        assert_same(ours, theirs, exactly=True)


def test_sequences_that_auto_holds_out() -> None:
    counts = {sequences: Auto().held_out(sequences) for sequences in (0, 8, 63, 64, 71, 72, 512)}
    assert counts == {0: 0, 8: 0, 63: 0, 64: 8, 71: 8, 72: 9, 512: 64}
    assert Auto(holdout=2).held_out(15) == 0
    assert Auto(holdout=2).held_out(16) == 8


def test_every_estimator_of_one_pass_by_its_definition() -> None:
    """Those of several passes: `oracles/test_estimators.py` and `oracles/test_fisher.py`."""
    x, g = stream(5, 7)
    x64, g64 = x.double(), g.double()
    G = torch.einsum("sto,sti->soi", g64, x64)
    xx, gg = torch.einsum("sti,stj->ij", x64, x64), torch.einsum("sti,stj->ij", g64, g64)
    GtG, GGt = torch.einsum("soi,soj->ij", G, G), torch.einsum("soi,spi->op", G, G)

    def unit(H: Tensor) -> Tensor:
        return H / H.diagonal().mean()

    eye_out, eye_in = torch.eye(D_OUT, dtype=torch.float64), torch.eye(D_IN, dtype=torch.float64)
    squares = (g64.square()[..., rows].mean(-1) for rows in (slice(2), slice(2, 4), slice(4, 5), slice(5, 6)))
    guided = [unit(torch.einsum("st,sti,stj->ij", square, x64, x64)) for square in squares]
    expected = {
        "identity": [(eye_out, eye_in)],
        "activation": [(eye_out, unit(xx))],
        "imatrix": [(eye_out, unit(torch.diag(xx.diagonal())))],
        "kfac": [(unit(gg), unit(xx))],
        "sketch-b": [(unit(GGt), unit(GtG))],
        "mean": [((unit(gg) + unit(GGt)) / 2, (unit(xx) + unit(GtG)) / 2)],
        "guided": [(torch.eye(size, dtype=torch.float64), H_in) for size, H_in in zip((2, 2, 1, 1), guided, strict=True)],
    }
    expected["diagonal"] = [tuple(torch.diag(H.diagonal()) for H in expected["mean"][0])]
    assert expected.keys() == {name for name in ESTIMATORS if name != "auto" and parse_curvature(name).passes == 1}
    for name, groups in expected.items():
        found = groups_of(filled(parse_curvature(name), x, g, batch=2).factors())
        for factors, (H_out, H_in) in zip(found, groups, strict=True):
            torch.testing.assert_close(factors.H_out.double(), H_out, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(factors.H_in.double(), H_in, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "d_out", "d_in"), [(2, 40, 24), (1, 300, 20), (100, 8, 12), (30, 300, 10)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gram_trick_and_the_direct_product_agree(
    tokens: int, d_out: int, d_in: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    formed = []
    direct = LayerGrad.weight_gradient
    monkeypatch.setattr(LayerGrad, "weight_gradient", lambda self, sequence: formed.append(sequence) or direct(self, sequence))
    x, g = stream(3, tokens, d_out=d_out, d_in=d_in)
    H_out, H_in = (covariance(d_out, 0), covariance(d_in, 1)) if weighted else (torch.eye(d).double() for d in (d_out, d_in))
    previous = KroneckerFactors(H_out=H_out.float(), H_in=H_in.float(), scale=1.0) if weighted else None
    factors = filled(SketchB(rounds=2), x, g, batch=3, index=int(weighted), previous=previous).factors()
    assert bool(formed) == (tokens > 2)
    G = torch.einsum("sto,sti->soi", g.double(), x.double())
    expected = KroneckerFactors.normalised(
        (G @ H_in @ G.mT).sum(0), (G.mT @ H_out @ G).sum(0), trace=G.square().sum().item() / (3 * tokens)
    )
    torch.testing.assert_close(factors.H_out.double(), expected.H_out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factors.H_in.double(), expected.H_in, rtol=1e-4, atol=1e-5)
    assert factors.scale == pytest.approx(expected.scale, rel=1e-5)


@pytest.mark.parametrize("d", [1, 7, 256, 257, 512, 530])
def test_gram_is_the_full_product_once_mirrored(d: int) -> None:
    x = draw(5, d, seed=d, dtype=torch.float32)
    result = symmetrise(gram(x))
    torch.testing.assert_close(result, x.T @ x)
    assert torch.equal(result, result.T)
    torch.testing.assert_close(symmetrise(gram(x) + gram(2 * x)), 5 * (x.T @ x))


def test_added_grams_are_summed() -> None:
    x = draw(5, 300, seed=0, dtype=torch.float32)
    total = gram(x)
    add_gram(total, 2 * x)
    torch.testing.assert_close(symmetrise(total), 5 * (x.T @ x))


def test_gram_sums_in_float32_whatever_it_is_given() -> None:
    x = draw(400, 3, seed=1).to(torch.bfloat16)
    assert gram(x).dtype == torch.float32
    torch.testing.assert_close(gram(x), x.float().T @ x.float())


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("kfac", 1),
        ("mean", 1),
        ("sketch-a", 4),
        ("sketch-a:rounds=3", 6),
        ("sketch-b", 1),
        ("sketch-b:rounds=3", 3),
        ("power", 8),
        ("power:rounds=2", 2),
        ("triangular", 3),
        ("triangular:shrinkage=0.25:rounds=1", 2),
        ("diagonal", 1),
        ("diagonal:of=power", 8),
        ("fastkron", 4),
        ("fastkron:steps=128:batch=16:tolerance=0.01", 128),
        ("guided", 1),
        ("guided:groups=2", 1),
    ],
)
def test_names_are_parsed(name: str, passes: int) -> None:
    estimator = parse_curvature(name)
    assert type(estimator) is ESTIMATORS[name.split(":", maxsplit=1)[0]]
    assert estimator.passes == passes


def test_settings_have_the_types_of_their_fields() -> None:
    assert parse_curvature("triangular:rounds=3:shrinkage=1") == Triangular(rounds=3, shrinkage=1.0)
    assert parse_curvature("diagonal:of=kfac") == Diagonal(of="kfac")
    assert parse_curvature("auto:holdout=4") == Auto(holdout=4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "unknown curvature"),
        ("KFAC", "unknown curvature"),
        ("fisher", "unknown curvature 'fisher': expected one of auto, identity,"),
        ("auto:holdout=1", "auto: holdout=1, expected 2 or more"),
        ("auto:holdout=no", "auto' does not take 'holdout=no': expected holdout=INTEGER"),
        ("kfac:rounds=2", "does not take 'rounds=2': expected no settings"),
        ("sketch-a:rounds", "does not take 'rounds': expected rounds=INTEGER"),
        ("sketch-a:rounds=-1", "expected 1 or more"),
        ("sketch-a:rounds=0", "expected 1 or more"),
        ("sketch-b:rounds=0", "expected 1 or more"),
        ("power:rounds=2.5", "does not take 'rounds=2.5': expected rounds=INTEGER"),
        ("triangular:rounds=0", "expected 1 or more"),
        ("triangular:shrinkage=half", "does not take 'shrinkage=half': expected rounds=INTEGER, shrinkage=NUMBER"),
        ("triangular:shrinkage=1.5", "shrinkage=1.5, expected 0"),
        ("triangular:shrinkage=nan", "shrinkage=nan, expected 0"),
        ("diagonal:of=fisher", "unknown curvature 'fisher'"),
        ("diagonal:of", "unknown curvature ''"),
        ("fastkron:steps=0", "fastkron: steps=0, expected 1 or more"),
        ("fastkron:batch=0", "fastkron: batch=0, expected 1 or more"),
        ("fastkron:tolerance=1", "tolerance=1.0, expected 0"),
        ("fastkron:tolerance=nan", "tolerance=nan, expected 0"),
        ("fastkron:rounds=2", "does not take 'rounds=2': expected batch=INTEGER, steps=INTEGER, tolerance=NUMBER"),
        ("guided:groups=0", "guided: groups=0, expected 1 or more"),
        ("diagonal:kfac", "does not take 'kfac': expected of=NAME"),
    ],
)
def test_bad_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(SchemeError, match=re.escape(message)):
        parse_curvature(name)
