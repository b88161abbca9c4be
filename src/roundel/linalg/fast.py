"""Matrix products of float32 matrices whose factors are rounded to bfloat16 on the way, where a processor has products of such factors.

A float32 product on a processor with bfloat16 units (AMX, AVX512-BF16) is some two to seven times as fast that way. Each factor gets a
relative error of 2^-9 that is independent from entry to entry: for steps whose gradients are noisy anyway, and for sums over many tokens,
which have a sampling error of their own; never for what is measured or compared, where it is as large as that of 8 bits per weight.
There are two ways. oneDNN rounds float32 factors itself and has float32 results. Factors that are converted first are multiplied almost
twice as fast (470 and 850 Gflop/s for 2048 x 576 x 1536 on two cores with AVX512-BF16, and .58 of the time of a linear's three products at
any width from 64 on), but torch has the result in bfloat16 only: a third rounding, for gradients that steps are taken along, and for states
inside a model that is trained with such noise.
Factors, results and gradients are float32 outside, so that nothing else of a model notices. Attention keeps float32: its products are
small, and in bfloat16 they take as long. Where there are no such units nothing changes.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["are_fast", "are_possible", "fast", "fast_products"]


def are_possible(device: torch.device) -> bool:
    """Whether products of bfloat16 factors are faster on this device than those of float32 ones."""
    return device.type == "cpu" and _has_units()


def are_fast(device: torch.device) -> bool:
    """Whether plain products on this device are now formed so."""
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return device.type == "cpu" and settings.fp32_precision == "bf16"


@contextmanager
def fast_products(device: torch.device | None = None) -> Iterator[None]:
    """Lets oneDNN round the factors of float32 products, within the context and on the CPU."""
    if (device is not None and device.type != "cpu") or not _has_units():
        yield
        return
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def fast(function: Callable[..., Any], *, gradients: bool = False, results: bool = False) -> Callable[..., Any]:
    """The function, in which linears on the CPU in float32 are computed so, and later their gradients.

    In the faster way, with one rounding more: the `gradients`; the `results`.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _Fast(gradients, results):
            return function(*args, **kwargs)

    return run


class _Fast(TorchFunctionMode):
    def __init__(self, gradients: bool, results: bool) -> None:
        super().__init__()
        self.gradients, self.results = gradients and _has_units(), results and _has_units()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Takes the place of each call of `torch.nn.functional.linear`."""
        if func is nn.functional.linear and not kwargs and all(_plain(tensor) for tensor in args if tensor is not None):
            return _Linear.apply(*args, *[None] * (3 - len(args)), self.gradients, self.results)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """`x W^T + bias`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, gradients: bool, results: bool) -> Tensor:
        """`x` is `(*batch, d_in)`, `W` is `(d_out, d_in)`; of the two only what the other's gradient needs is kept."""
        needed: list[Tensor | None] = [x if ctx.needs_input_grad[1] else None, W if ctx.needs_input_grad[0] else None]
        if results:
            x, W = x.bfloat16(), W.bfloat16()
        if gradients:  # of what is converted already this is no copy
            needed = [None if whole is None else half.bfloat16() for whole, half in zip(needed, (x, W), strict=True)]
        ctx.save_for_backward(*needed)
        ctx.gradients = gradients
        with fast_products():
            if results:
                y = nn.functional.linear(x, W).float()
                return y if bias is None else y.add_(bias)
            y = nn.functional.linear(x.reshape(-1, x.shape[-1]), W, bias)
            whole: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(W)])  # no view to autograd: models add to outputs in place
            return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of `x`, `W` and `bias`, as far as they are asked for."""
        (x, W), wanted = ctx.saved_tensors, ctx.needs_input_grad
        batch = gradients[0].shape[:-1]
        g = gradients[0].flatten(0, -2)
        of_bias = g.sum(0) if wanted[2] else None
        if ctx.gradients:
            g = g.bfloat16()
        with fast_products():
            of_x = (g @ W).float().unflatten(0, batch) if wanted[0] else None
            of_W = (g.T @ x.flatten(0, -2)).float() if wanted[1] else None
        return of_x, of_W, of_bias, None, None


@cache
def _has_units() -> bool:
    """Whether products of bfloat16 factors are fast here, not only possible."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32
