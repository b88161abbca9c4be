"""GuidedQuant's groups against dense Fisher blocks."""

from __future__ import annotations

import pytest
import torch

from oracles.test_estimators import gradient_stream
from oracles.tiny import collected, dense_fisher, linears, random_tokens, repeated, tiny_llama
from roundel.curvature import parse_curvature
from roundel.types import GroupedFactors, KroneckerFactors, LayerGrad, LayerInput

CPU = torch.device("cpu")


def groups_of(spec: str, x: torch.Tensor, g: torch.Tensor) -> tuple[KroneckerFactors, ...]:
    sketch = parse_curvature(spec).sketch(g.shape[2], x.shape[2], CPU)
    sketch.update(LayerGrad(input=LayerInput(x), g=g))
    factors = sketch.factors()
    assert isinstance(factors, GroupedFactors)
    return factors.groups


def test_with_a_group_for_each_channel_and_one_token_the_diagonal_blocks_of_the_fisher_are_exact() -> None:
    x, g = gradient_stream(5, 7, sequences=30, tokens=1, seed=1)
    G = torch.einsum("sto,sti->soi", g.double(), x.double())
    groups = groups_of("guided:groups=5", x, g)
    assert len(groups) == 5
    for channel, group in enumerate(groups):
        exact = torch.einsum("si,sj->ij", G[:, channel], G[:, channel]) / 30
        assert group.H_out.tolist() == [[1.0]]
        torch.testing.assert_close((group.scale * group.H_in).double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize(("groups", "sizes"), [(1, [7]), (2, [4, 3]), (4, [2, 2, 2, 1]), (7, [1] * 7), (20, [1] * 7)])
def test_groups_are_even_and_average_the_blocks_of_their_channels(groups: int, sizes: list[int]) -> None:
    x, g = gradient_stream(7, 5, sequences=6, seed=2)
    x64, g64 = x.flatten(0, 1).double(), g.flatten(0, 1).double()
    blocks = torch.einsum("to,ti,tj->oij", g64.square(), x64, x64) / len(x64)
    found = groups_of(f"guided:groups={groups}", x, g)
    assert [len(group.H_out) for group in found] == sizes
    for group, part in zip(found, blocks.split(sizes), strict=True):
        assert torch.equal(group.H_out, torch.eye(len(part)))
        assert group.H_in.diagonal().mean().item() == pytest.approx(1, rel=1e-5)
        expected = part.mean(0)
        torch.testing.assert_close((group.scale * group.H_in).double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_one_group_is_a_half_round_of_sketch_a_from_the_identity() -> None:
    x, g = gradient_stream(7, 5, sequences=6, seed=2)
    start = KroneckerFactors(H_out=torch.eye(7), H_in=torch.eye(5), scale=1.0)
    sketch = parse_curvature("sketch-a").sketch(7, 5, CPU, index=2, previous=start)
    sketch.update(LayerGrad(input=LayerInput(x), g=g))
    half_round, (group,) = sketch.factors(), groups_of("guided:groups=1", x, g)
    assert isinstance(half_round, KroneckerFactors)
    torch.testing.assert_close(group.H_in, half_round.H_in, rtol=1e-4, atol=1e-5)
    assert group.scale == pytest.approx(half_round.scale, rel=1e-5)


def test_a_group_that_no_gradient_reaches_has_scale_zero() -> None:
    x, g = gradient_stream(6, 5, sequences=3, seed=2)
    g[..., 2:4] = 0
    scales = [group.scale for group in groups_of("guided:groups=3", x, g)]
    assert scales[1] == 0
    assert scales[0] > 0
    assert scales[2] > 0


def test_it_approaches_the_exact_fishers_blocks_where_tokens_do_not_interact() -> None:
    """In the last layer's down_proj a token's output reaches that token's logits alone, so there are no cross-token terms."""
    model, tokens, name, draws = tiny_llama(), random_tokens(1, 5, seed=3), "model.layers.1.mlp.down_proj", 750
    linear = linears(model)[name]
    d_out, d_in = linear.weight.shape
    exact = dense_fisher(model, [linear.weight], tokens.ids[0]).reshape(d_out, d_in, d_out, d_in) / 5
    factors = collected(model, {name: linear}, repeated(tokens, draws), "guided:groups=4", seed=0, batch_size=500)[name]
    blocks = torch.einsum("oioj->oij", exact)
    for rows, group in factors.row_groups():
        block = blocks[rows].mean(0)
        assert torch.linalg.norm(group.scale * group.H_in - block) < 0.14 * torch.linalg.norm(block)
