"""Linears with bfloat16 inside: float32 outside, exact gradients but for that rounding, and nothing else of the model touched."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from roundel.linalg.fast import fast


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16().double()


def parts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=random) for shape in ((3, 40, 96), (64, 96), (64,), (3, 40, 64)))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("half", [{}, {"gradients": True}, {"results": True}, {"gradients": True, "results": True}], ids="+".join)
def test_results_and_gradients_are_those_of_rounded_or_of_exact_factors(with_bias, half) -> None:
    x, W, bias, g = parts()
    given = [tensor.requires_grad_(True) for tensor in ((x, W, bias) if with_bias else (x, W))]
    y = fast(nn.functional.linear, **half)(*given)
    of_given = torch.autograd.grad(y, given, g)
    assert y.dtype == torch.float32
    x, W, bias = x.detach(), W.detach(), bias.detach()
    for kind, found, exact, inexact in (
        ("results", y.detach() - (bias if with_bias else 0), x.double() @ W.double().T, rounded(x) @ rounded(W).T),
        ("gradients", of_given[0], g.double() @ W.double(), rounded(g) @ rounded(W)),
        (
            "gradients",
            of_given[1],
            (g.flatten(0, 1).double().T @ x.flatten(0, 1).double()),
            rounded(g.flatten(0, 1)).T @ rounded(x.flatten(0, 1)),
        ),
    ):
        errors = [(found.double() - wanted).abs().max() / wanted.abs().max() for wanted in (exact, inexact)]
        assert found.dtype == torch.float32
        assert min(errors) < (2**-8 if half.get(kind) else 1e-5)  # the second where the processor has bfloat16 units
        assert max(errors) < 1e-2
    if with_bias:
        torch.testing.assert_close(of_given[2], g.sum((0, 1)))


def test_what_asks_for_no_gradient_gets_none() -> None:
    x, W, _, g = parts()
    W.requires_grad_(True)
    (of_W,) = torch.autograd.grad(fast(nn.functional.linear)(x, W), [W], g)
    x.requires_grad_(True)
    (of_x,) = torch.autograd.grad(fast(nn.functional.linear)(x, W.detach()), [x], g)
    assert of_W.shape == W.shape
    assert of_x.shape == x.shape


def test_everything_else_is_exact_inside_and_outside() -> None:
    x, W, _, _ = parts()
    plain, product = nn.functional.linear(x, W), x @ W.T
    doubled, halved = nn.functional.linear(x.double(), W.double()), nn.functional.linear(x.bfloat16(), W.bfloat16())
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert torch.equal(fast(torch.matmul)(x, W.T), product)
    assert torch.equal(fast(nn.functional.linear)(x.double(), W.double()), doubled)
    assert torch.equal(fast(nn.functional.linear)(x.bfloat16(), W.bfloat16()), halved)
    with pytest.raises(RuntimeError):
        fast(nn.functional.linear)(x, W[:, :-1])
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert torch.equal(nn.functional.linear(x, W), plain)


def test_a_layer_that_is_computed_again_has_the_same_gradients() -> None:
    x, W, bias, g = parts()
    layer = nn.Sequential(nn.Linear(96, 64), nn.GELU())
    with torch.no_grad():
        layer[0].weight.copy_(W)
        layer[0].bias.copy_(bias)
    found = []
    for again in (False, True):
        layer.zero_grad()
        run = partial(checkpoint, fast(layer), use_reentrant=False) if again else layer
        fast(run)(x).backward(g)
        found.append(layer[0].weight.grad.clone())
    assert torch.equal(*found)
