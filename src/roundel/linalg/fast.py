"""Matrix products of float32 matrices whose factors are rounded to bfloat16 on the way and summed in float32, where a processor has them.

A float32 product on a processor with bfloat16 units (AMX, AVX512-BF16) is some three to seven times as fast that way. Each factor gets a
relative error of 2^-9 that is independent from entry to entry: for steps whose gradients are noisy anyway, and for sums over many tokens,
which have a sampling error of their own; never for what is measured or compared, where it is as large as that of 8 bits per weight.
Factors, results and gradients stay float32, so that nothing else of a model notices. Attention keeps float32: its products are small, and
rounding their factors takes longer than it saves. Where there are no such units nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["are_fast", "fast", "fast_products"]


def are_fast(device: torch.device) -> bool:
    """Whether plain products on this device are now formed so."""
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return device.type == "cpu" and settings.fp32_precision == "bf16"


@contextmanager
def fast_products(device: torch.device | None = None) -> Iterator[None]:
    """Lets oneDNN round the factors of float32 products, within the context and on the CPU."""
    if (device is not None and device.type != "cpu") or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield
        return
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def fast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, in which linears on the CPU in float32 are computed so, and later their gradients."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _Fast():
            return function(*args, **kwargs)

    return run


class _Fast(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Takes the place of each call of `torch.nn.functional.linear`."""
        if func is nn.functional.linear and not kwargs and all(_plain(tensor) for tensor in args if tensor is not None):
            return _Linear.apply(*args, *[None] * (3 - len(args)))  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """`x W^T + bias`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        """`x` is `(*batch, d_in)`, `W` is `(d_out, d_in)`; of the two only what the other's gradient needs is kept."""
        wanted = ctx.needs_input_grad
        ctx.save_for_backward(x if wanted[1] else None, W if wanted[0] else None)
        with fast_products():
            return nn.functional.linear(x, W, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of `x`, `W` and `bias`, as far as they are asked for."""
        (x, W), wanted = ctx.saved_tensors, ctx.needs_input_grad
        batch = gradients[0].shape[:-1]
        g = gradients[0].flatten(0, -2)
        with fast_products():
            of_x = (g @ W).unflatten(0, batch) if wanted[0] else None
            of_W = g.T @ x.flatten(0, -2) if wanted[1] else None
        return of_x, of_W, g.sum(0) if wanted[2] else None


def _plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32
